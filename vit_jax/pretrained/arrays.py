"""Read named arrays from .npz, .safetensors and PyTorch files, and stack the arrays of blocks.

Every header is checked against the file before its data is read. Reading never unpickles, runs code
or writes. A file with wrong sizes, missing data or a repeated name raises UserError.

A flat tree maps '/'-joined parameter names to NumPy arrays:
{'Transformer/encoderblock/LayerNorm_0/scale': [depth, d], 'cls': [1, 1, d], …}.
"""

import dataclasses
import functools
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from vit_jax.errors import UserError
from vit_jax.pretrained.torch_file import read_torch_file
from vit_jax.pretrained.weight_files import (
  check_file_kind,
  check_regular_file,
  choose_weights,
  is_legacy_torch_file,
)
from vit_jax.runtime.files import summarize_error

# Names in our parameter tree that more than one format needs.
BLOCK_PREFIX = 'Transformer/encoderblock/'
ATTENTION_MODULE = 'MultiHeadDotProductAttention_1'
POSITION_EMBEDDING = 'Transformer/posembed_input/pos_embedding'
RELATIVE_TABLE = f'{BLOCK_PREFIX}{ATTENTION_MODULE}/relative/table'
PATCH_KERNEL = 'embedding/kernel'
RESNET_ROOT_KERNEL = 'conv_root/kernel'
PRE_HEAD_NORM_SCALE = 'norm-pre-head/scale'
EFFICIENTNET_STEM_KERNEL = 'stem_conv/kernel'

# Weights hardly compress, so a zip file that expands by more than this factor is a decompression
# bomb.
MAX_ZIP_EXPANSION = 100
ZIP_SIZE_ALLOWANCE = 1 << 20  # Bytes that any zip file may expand to.
# Prefixes that wrappers of PyTorch modules give to all names: DataParallel, torch.compile, and
# attributes of a training script's module.
WRAPPER_PREFIXES = ('module.', '_orig_mod.', 'model.', 'backbone.')
READ_CHUNK = 1 << 22  # Bytes per read, straight into the array.
BFLOAT16 = np.dtype('V2')  # NumPy has no bfloat16. big_vision stores the two raw bytes.
SAFETENSORS_FLOATS = {
  'F64': np.dtype('f8'), 'F32': np.dtype('f4'), 'F16': np.dtype('f2'), 'BF16': BFLOAT16,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayHeader:
  """Shape and dtype of an array in a file. `read()` returns its data in the dtype of the file."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


class LazyArrays(Mapping):
  """Mapping from name to float32 array, which reads an array from its file on access.

  Access raises UserError if the array is unreadable, is not floating-point, or holds NaN or
  infinity.
  """

  def __init__(self, source: str, headers: dict[str, ArrayHeader], notes: tuple[str, ...] = ()):
    self.source, self._headers, self.notes = source, headers, notes

  def __iter__(self) -> Iterator[str]:
    return iter(self._headers)

  def __len__(self) -> int:
    return len(self._headers)

  def __contains__(self, name) -> bool:
    return name in self._headers

  def shape_of(self, name: str) -> tuple[int, ...]:
    """Return the shape of an array without reading its data."""
    return self._headers[name].shape

  def array_header(self, name: str) -> ArrayHeader:
    """Return the header of an array, to build a view of the file under other names."""
    return self._headers[name]

  def with_prefix(self, prefix: str) -> 'LazyArrays':
    """Return the arrays whose names start with `prefix`, with the prefix removed."""
    selected = {
      name.removeprefix(prefix): header
      for name, header in self._headers.items()
      if name.startswith(prefix)
    }
    return LazyArrays(self.source, selected)

  def __getitem__(self, name: str) -> np.ndarray:
    header = self._headers[name]
    try:
      array = header.read()
    except Exception as error:  # zipfile, NumPy and safetensors raise many unrelated types.
      raise unreadable_error(self.source, f'{name}: {summarize_error(error)}') from None
    if header.dtype == BFLOAT16:
      array = np.ascontiguousarray(array).view(ml_dtypes.bfloat16)
    elif header.dtype.kind != 'f':
      raise UserError(f'{self.source}: {name} has dtype {header.dtype}; expected floating point')
    array = np.ascontiguousarray(array, np.float32)
    if array.size and not np.isfinite((array.min(), array.max())).all():
      raise UserError(f'{self.source}: {name} contains NaN or infinite values')
    return array


def allocate_aligned(shape: tuple[int, ...], dtype: str | np.dtype = 'f4') -> np.ndarray:
  """Return an uninitialized array that starts at a multiple of 64 bytes.

  JAX on a CPU uses such an array without a copy.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def open_arrays(path: Path) -> LazyArrays:
  """Open an .npz, .safetensors or PyTorch file, or the weights of a directory.

  Raises UserError if a file is not readable, or if an array name occurs twice.
  """
  files = [path]
  if path.is_dir():
    names = [file.name for file in path.iterdir()]
    files = [path / name for name in choose_weights(names, str(path))]
  headers, notes = {}, ()
  for file in files:
    try:
      new, new_notes = read_headers(file)
    except UserError:
      raise
    except Exception as error:
      raise unreadable_error(str(file), summarize_error(error)) from None
    if repeated := headers.keys() & new.keys():
      raise UserError(f'{path} contains {min(repeated)} twice')
    headers |= new
    notes += new_notes
  return LazyArrays(str(path), headers, notes)


def read_headers(path: Path) -> tuple[dict[str, ArrayHeader], tuple[str, ...]]:
  """Read all headers of a file, whose first bytes decide what it is, and notes about it.

  A prefix that all names of a safetensors or PyTorch file have in common is removed.
  """
  check_regular_file(path)
  with path.open('rb') as file:
    is_zip = file.read(2) == b'PK'  # True for an empty zip file too.
  if is_zip and not is_torch_zip(path):
    return read_npz_headers(path), ()
  if is_zip or is_legacy_torch_file(path):
    arrays, notes = read_torch_file(path, mmap=is_zip)
    headers = {
      name: ArrayHeader(array.shape, array.dtype, functools.partial(np.asarray, array))
      for name, array in arrays.items()
    }
  else:
    check_file_kind(path)
    headers, notes = read_safetensors_headers(path), ()
  prefix = common_prefix(headers)
  if prefix:
    notes += (f'the prefix {prefix!r} of all names is ignored',)
  return {name.removeprefix(prefix): header for name, header in headers.items()}, notes


def is_torch_zip(path: Path) -> bool:
  """Return whether a zip file was written by `torch.save`."""
  with zipfile.ZipFile(path) as file:
    return any(name.endswith('/data.pkl') for name in file.namelist())


def common_prefix(names: Iterable[str]) -> str:
  """Return the wrappers of PyTorch modules, such as 'module.', that start all names."""
  names, prefix = list(names), ''
  while names:
    starts = [
      wrapper
      for wrapper in WRAPPER_PREFIXES
      if all(name.startswith(prefix + wrapper) for name in names)
    ]
    if not starts:
      break
    prefix += starts[0]
  return prefix


def unreadable_error(source: str, why: str) -> UserError:
  """Return the one-line error for a file that cannot be read."""
  return UserError(f'{source} is not a readable array file: {why}')


def read_npz_headers(path: Path) -> dict[str, ArrayHeader]:
  """Read the header of each .npy member of a zip file."""
  size, headers = path.stat().st_size, {}
  with zipfile.ZipFile(path) as file:
    members = file.infolist()
    total = sum(member.file_size for member in members)
    if total > ZIP_SIZE_ALLOWANCE + MAX_ZIP_EXPANSION * size:
      raise ValueError(f'{size:,} bytes claim to expand to {total:,}')
    for member in members:
      name = member.filename.removesuffix('.npy')
      if name in headers:
        raise ValueError(f'it contains {name} twice')
      with file.open(member) as stream:
        headers[name] = read_npy_header(path, member, stream)
  return headers


def read_npy_header(path: Path, member: zipfile.ZipInfo, stream) -> ArrayHeader:
  """Read the header of one member, and check that its size fits the shape and dtype."""
  version = np.lib.format.read_magic(stream)
  read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
  if version not in read:
    raise ValueError(f'{member.filename} has .npy format {version}; expected 1.0 or 2.0')
  shape, fortran, dtype = read[version](stream)
  if dtype.hasobject:
    raise ValueError(f'{member.filename} contains pickled objects, which could run code')
  start, size = stream.tell(), math.prod(shape)
  if start + size * dtype.itemsize != member.file_size:
    raise ValueError(
      f'{member.filename} claims to be {dtype} {list(shape)}, '
      f'but has {member.file_size - start:,} bytes of data'
    )

  def read_member() -> np.ndarray:
    out = allocate_aligned((size,), dtype)
    view = memoryview(out.view(np.uint8)) if out.size else memoryview(b'')
    with zipfile.ZipFile(path) as file, file.open(member) as stream:
      stream.read(start)
      done = 0
      while done < len(view):
        chunk = stream.read(min(READ_CHUNK, len(view) - done))
        if not chunk:
          raise EOFError(f'{member.filename} is truncated')
        view[done : done + len(chunk)] = chunk
        done += len(chunk)
      if stream.read(1):  # Reading to the end also verifies the zip file's CRC.
        raise ValueError(f'{member.filename} is longer than its header says')
    return out.reshape(shape, order='F' if fortran else 'C')

  return ArrayHeader(tuple(shape), dtype, read_member)


def read_safetensors_headers(path: Path) -> dict[str, ArrayHeader]:
  """Read the header of each tensor. The safetensors library checks them against the file."""
  with safe_open(path, 'numpy') as file:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- not a dict.
    return {
      name: ArrayHeader(
        tuple(tensor.get_shape()),
        SAFETENSORS_FLOATS.get(tensor.get_dtype(), np.dtype('V1')),
        make_tensor_reader(path, name),
      )
      for name, tensor in slices.items()
    }


def make_tensor_reader(path: Path, name: str) -> Callable[[], np.ndarray]:
  """Return a function that opens the file and reads one tensor."""

  def read() -> np.ndarray:
    with safe_open(path, 'numpy') as file:
      return file.get_tensor(name)

  return read


def stack_blocks(
  arrays: Iterable[tuple[str, int | None, np.ndarray]], *, depth: int, source: str
) -> dict[str, np.ndarray]:
  """Stack the arrays of each block along a leading depth axis, and return a flat tree.

  `arrays` yields (name in our tree, block index or None, array). Each array is copied to its place
  as it arrives, so that the file is in memory once. `depth` is the number of distinct blocks.

  Raises UserError if a block lacks an array that another block has, or if shapes differ between
  blocks.
  """
  flat, blocks_by_name = {}, {}
  for name, block, array in arrays:
    if block is None:
      flat[name] = array
      continue
    if block >= depth:  # Check before allocating memory for this many blocks.
      raise UserError(f'{source}: block {block} is out of range for a depth of {depth}')
    if name not in flat:
      flat[name] = allocate_aligned((depth, *array.shape))
    out = flat[name]
    if out.shape[1:] != array.shape:
      raise UserError(
        f'{source}: {name} has shape {list(array.shape)} in block {block}, '
        f'and {list(out.shape[1:])} in other blocks'
      )
    out[block] = array
    blocks_by_name.setdefault(name, set()).add(block)
  for name, blocks in blocks_by_name.items():
    if missing := set(range(depth)) - blocks:
      short_name = name.removeprefix(BLOCK_PREFIX)
      raise UserError(f'{source}: block {min(missing)} of {depth} has no {short_name}')
  return flat


def unstack_blocks(flat: dict[str, np.ndarray]) -> Iterator[tuple[str, int | None, np.ndarray]]:
  """Yield (name, block index or None, array): the inverse of `stack_blocks`."""
  for name, array in flat.items():
    if name.startswith(BLOCK_PREFIX):
      yield from ((name, block, array[block]) for block in range(array.shape[0]))
    else:
      yield name, None, array


def head_classes(flat: dict[str, np.ndarray]) -> int:
  """Return the number of classes of the head, or 0 without a head."""
  return flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0


def summarize_list(items: Sequence[str], *, limit: int = 5, separator: str = '; ') -> str:
  """Join the first `limit` items, and say how many more there are."""
  more = f'{separator}and {len(items) - limit} more' if len(items) > limit else ''
  return separator.join(items[:limit]) + more
