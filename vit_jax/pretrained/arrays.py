"""Files of named arrays, .npz and .safetensors: every header is checked against the file before anything is read.

No pickle, no code, nothing written. A file that lies about its sizes, is cut short, or holds a name twice is a UserError.
"""

import dataclasses
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from vit_jax.errors import UserError

MAX_ZIP_EXPANSION = (
  100  # A zip that grows more than this is a bomb: weights hardly compress. Below SMALL it may.
)
ZIP_SIZE_ALLOWANCE = 1 << 20  # Bytes.
READ_CHUNK = 1 << 22  # Bytes read at a time, straight into the array.
BFLOAT16 = np.dtype('V2')  # NumPy has none, and big_vision stores the two raw bytes.
SAFETENSORS_FLOATS = {
  'F64': np.dtype('f8'),
  'F32': np.dtype('f4'),
  'F16': np.dtype('f2'),
  'BF16': BFLOAT16,
}  # safetensors' names.


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayHeader:
  """What a file says of one of its arrays. `read` gives it as it is on disk."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


class LazyArrays(Mapping):
  """The arrays of a file by name, read when asked for, as float32. UserError for one that is not all finite numbers."""

  def __init__(self, source: str, headers: dict[str, ArrayHeader]):
    self.source, self._headers = source, headers

  def __iter__(self) -> Iterator[str]:
    return iter(self._headers)

  def __len__(self) -> int:
    return len(self._headers)

  def __contains__(self, name) -> bool:
    return name in self._headers

  def shape(self, name: str) -> tuple[int, ...]:
    """Of an array, without reading it."""
    return self._headers[name].shape

  def header(self, name: str) -> ArrayHeader:
    """What the file says of an array, for a view of the file under other names."""
    return self._headers[name]

  def within(self, prefix: str) -> 'LazyArrays':
    """Those whose name starts with `prefix`, without it."""
    return LazyArrays(
      self.source,
      {
        n.removeprefix(prefix): header
        for n, header in self._headers.items()
        if n.startswith(prefix)
      },
    )

  def __getitem__(self, name: str) -> np.ndarray:
    header = self._headers[name]
    try:
      array = header.read()
    except (
      Exception
    ) as error:  # Of a zip, of NumPy, of safetensors, of the disk: they raise what they like.
      raise unreadable_error(self.source, f'{name}: {reason(error)}') from None
    if header.dtype == BFLOAT16:
      array = np.ascontiguousarray(array).view(ml_dtypes.bfloat16)
    elif header.dtype.kind != 'f':
      raise UserError(f'{self.source}: {name} holds {header.dtype}, not floating-point numbers')
    array = np.ascontiguousarray(array, np.float32)
    if array.size and not np.isfinite((array.min(), array.max())).all():
      raise UserError(f'{self.source}: {name} holds NaN or infinite values')
    return array


def allocate_aligned(shape: tuple[int, ...], dtype: str | np.dtype = 'f4') -> np.ndarray:
  """As np.empty, at a multiple of 64 bytes: JAX then takes the array on a CPU as it is, where it would copy another."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def open_arrays(path: Path) -> LazyArrays:
  """The arrays of an .npz, a .safetensors file, or all *.safetensors of a directory. UserError for anything else."""
  files = sorted(path.glob('*.safetensors')) if path.is_dir() else [path]
  if not files:
    raise UserError(f'{path} holds no .safetensors file')
  headers = {}
  for file in files:
    try:
      piece = read_headers(file)
    except Exception as error:
      raise unreadable_error(str(file), reason(error)) from None
    if twice := headers.keys() & piece.keys():
      raise UserError(f'{path} holds {min(twice)} twice')
    headers |= piece
  return LazyArrays(str(path), headers)


def read_headers(path: Path) -> dict[str, ArrayHeader]:
  """By the kind of file that its first bytes say it is."""
  with path.open('rb') as file:
    is_zip = file.read(2) == b'PK'  # An empty one too.
  return read_npz_headers(path) if is_zip else read_safetensors_headers(path)


def unreadable_error(source: str, why: str) -> UserError:
  """In one line."""
  return UserError(f'{source} is not a readable file of arrays: {why}')


def reason(error: Exception) -> str:
  """The first line of an error, or its kind."""
  return (str(error) or type(error).__name__).splitlines()[0]


def read_npz_headers(path: Path) -> dict[str, ArrayHeader]:
  """Of each member of a zip of .npy files."""
  size, headers = path.stat().st_size, {}
  with zipfile.ZipFile(path) as file:
    members = file.infolist()
    total = sum(member.file_size for member in members)
    if total > ZIP_SIZE_ALLOWANCE + MAX_ZIP_EXPANSION * size:
      raise ValueError(f'{size:,} bytes claim to hold {total:,}')
    for member in members:
      name = member.filename.removesuffix('.npy')
      if name in headers:
        raise ValueError(f'it holds {name} twice')
      with file.open(member) as stream:
        headers[name] = read_npy_header(path, member, stream)
  return headers


def read_npy_header(path: Path, member: zipfile.ZipInfo, stream) -> ArrayHeader:
  """Of one member, whose size must be that of the header and of the array it speaks of."""
  version = np.lib.format.read_magic(stream)
  read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
  if version not in read:
    raise ValueError(
      f'{member.filename} has the .npy format {version}, which is neither 1.0 nor 2.0'
    )
  shape, fortran, dtype = read[version](stream)
  if dtype.hasobject:
    raise ValueError(
      f'{member.filename} holds pickled objects, which could run code: they are refused'
    )
  start, count = stream.tell(), math.prod(shape)
  if start + count * dtype.itemsize != member.file_size:
    raise ValueError(
      f'{member.filename} says it is {dtype} {list(shape)}, and holds {member.file_size - start:,} bytes'
    )

  def read_member() -> np.ndarray:
    out = allocate_aligned((count,), dtype)
    view = memoryview(out.view(np.uint8)) if out.size else memoryview(b'')
    with zipfile.ZipFile(path) as file, file.open(member) as stream:
      stream.read(start)
      done = 0
      while done < len(view):
        piece = stream.read(min(READ_CHUNK, len(view) - done))
        if not piece:
          raise EOFError(f'{member.filename} is cut short')
        view[done : done + len(piece)] = piece
        done += len(piece)
      if stream.read(1):  # At the end, the checksum has been compared.
        raise ValueError(f'{member.filename} is longer than it says')
    return out.reshape(shape, order='F' if fortran else 'C')

  return ArrayHeader(tuple(shape), dtype, read_member)


def read_safetensors_headers(path: Path) -> dict[str, ArrayHeader]:
  """Of each tensor. The library checks the header against the file."""
  with safe_open(path, 'numpy') as file:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- it is no dict.
    return {
      name: ArrayHeader(
        tuple(tensor.get_shape()),
        SAFETENSORS_FLOATS.get(tensor.get_dtype(), np.dtype('V1')),
        make_tensor_reader(path, name),
      )
      for name, tensor in slices.items()
    }


def make_tensor_reader(path: Path, name: str) -> Callable[[], np.ndarray]:
  """Reads one tensor of a file that is not kept open."""

  def read() -> np.ndarray:
    with safe_open(path, 'numpy') as file:
      return file.get_tensor(name)

  return read


BLOCK_PREFIX = 'Transformer/encoderblock/'


def stack_blocks(
  arrays: Iterable[tuple[str, int | None, np.ndarray]], *, depth: int, source: str
) -> dict[str, np.ndarray]:
  """A stream of (name in our tree, block or None, array) -> the flat tree; `depth` is the number of different blocks.

  Each array is copied to its place as it comes, so that a file is in memory once. UserError where a block lacks an array
  that another has, or the blocks differ in a shape.
  """
  flat, seen = {}, {}
  for name, block, array in arrays:
    if block is None:
      flat[name] = array
      continue
    if block >= depth:  # Before anything is allocated for so many.
      raise UserError(f'{source}: there is a block {block}, and only {depth} blocks')
    if name not in flat:
      flat[name] = allocate_aligned((depth, *array.shape))
    out = flat[name]
    if out.shape[1:] != array.shape:
      raise UserError(
        f'{source}: {name} is {list(array.shape)} in block {block}, and {list(out.shape[1:])} in others'
      )
    out[block] = array
    seen.setdefault(name, set()).add(block)
  for name, blocks in seen.items():
    if missing := set(range(depth)) - blocks:
      raise UserError(
        f'{source}: block {min(missing)} of {depth} has no {name.removeprefix(BLOCK_PREFIX)}'
      )
  return flat


def unstack_blocks(flat: dict[str, np.ndarray]) -> Iterator[tuple[str, int | None, np.ndarray]]:
  """The inverse of `stack_blocks`."""
  for name, array in flat.items():
    if name.startswith(BLOCK_PREFIX):
      yield from ((name, block, array[block]) for block in range(array.shape[0]))
    else:
      yield name, None, array
