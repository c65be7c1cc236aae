"""Array files: valid ones are read exactly, others raise a one-line error quickly."""

import io
import resource
import struct
import time
import tracemalloc
import zipfile

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import allocate_aligned, open_arrays

RNG = np.random.default_rng(0)
ARRAYS = {
  'cls': RNG.standard_normal((1, 1, 8), np.float32),
  'embedding/kernel': RNG.standard_normal((4, 4, 3, 8), np.float32),
  'head/kernel': RNG.standard_normal((8, 300), np.float32),
  'opt/step': np.array(7),
}


def assert_same(arrays, expected=ARRAYS):
  assert set(arrays) == set(expected)
  for name, array in expected.items():
    if array.dtype.kind == 'f':
      np.testing.assert_array_equal(arrays[name], array)


SAVE = {
  'npz': lambda out: np.savez(out, **ARRAYS),
  'compressed': lambda out: np.savez_compressed(out, **ARRAYS),
  'safetensors': lambda out: out.write(save(ARRAYS)),
}


@pytest.fixture(params=SAVE)
def file(request, tmp_path):
  path = tmp_path / 'model'
  with path.open('wb') as out:
    SAVE[request.param](out)
  return path


def test_written_arrays_are_read_exactly(file):
  assert_same(open_arrays(file))


def test_shapes_are_known_before_arrays_are_read(file):
  arrays = open_arrays(file)
  file.unlink()
  assert arrays.shape_of('head/kernel') == (8, 300)
  with pytest.raises(UserError, match='head/kernel'):
    arrays['head/kernel']


def test_access_to_an_integer_array_raises(file):
  with pytest.raises(UserError, match='opt/step'):
    open_arrays(file)['opt/step']


def npz(path, **arrays):
  np.savez(path / 'model.npz', **arrays)
  return open_arrays(path / 'model.npz')


@pytest.mark.parametrize('dtype', ['<f2', '>f2', '<f4', '>f4', '<f8', '>f8'])
@pytest.mark.parametrize('order', ['C', 'F'])
def test_every_byte_order_and_axis_order_is_read(tmp_path, dtype, order):
  array = np.asarray(RNG.standard_normal((3, 4, 5)).astype(dtype), order=order)
  found = npz(tmp_path, a=array)['a']
  assert found.dtype == np.float32
  assert found.flags.c_contiguous
  np.testing.assert_array_equal(found, array.astype(np.float32))


def test_bfloat16_is_read_from_two_raw_bytes_and_from_safetensors(tmp_path):
  array = RNG.standard_normal((3, 4)).astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(npz(tmp_path, a=array.view('V2'))['a'], array.astype(np.float32))
  save_file({'a': array}, tmp_path / 'a.safetensors')
  np.testing.assert_array_equal(
    open_arrays(tmp_path / 'a.safetensors')['a'], array.astype(np.float32)
  )


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_raise(tmp_path, value):
  array = np.ones((3, 4), np.float32)
  array[1, 2] = value
  with pytest.raises(UserError, match='a contains NaN'):
    npz(tmp_path, a=array)['a']


def test_an_empty_array_and_a_scalar_are_read(tmp_path):
  arrays = npz(tmp_path, none=np.zeros((0, 3), np.float32), one=np.float32(2))
  assert arrays['none'].shape == (0, 3)
  assert arrays['one'] == 2


def test_safetensors_files_of_a_directory_are_read_together(tmp_path):
  names = sorted(ARRAYS)
  for i, part in enumerate((names[:2], names[2:])):
    save_file(
      {name: ARRAYS[name] for name in part}, tmp_path / f'model-0000{i + 1}-of-00002.safetensors'
    )
  assert_same(open_arrays(tmp_path))
  save_file({names[0]: ARRAYS[names[0]]}, tmp_path / 'model-00002-of-00002.safetensors')
  with pytest.raises(UserError, match=f'{names[0]} twice'):
    open_arrays(tmp_path)


def test_allocated_arrays_are_aligned_to_64_bytes():
  for shape in ((), (3,), (5, 7), (300, 300, 3)):
    array = allocate_aligned(shape)
    assert array.shape == shape
    assert array.ctypes.data % 64 == 0
  assert allocate_aligned((0, 4)).shape == (0, 4)


# Hostile files.


def member(array: np.ndarray) -> bytes:
  out = io.BytesIO()
  np.lib.format.write_array(out, array)
  return out.getvalue()


def claims(shape: tuple[int, ...]) -> bytes:
  """Return an .npy file whose header claims more data than it has."""
  out = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    out, {'descr': '<f4', 'fortran_order': False, 'shape': shape}
  )
  return out.getvalue() + b'0123'


def zipped(members: list[tuple[str, bytes]], compression=zipfile.ZIP_STORED) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', compression) as file:
    for name, data in members:
      file.writestr(name, data)
  return out.getvalue()


class Trap:
  def __reduce__(self):
    return (pytest.fail, ('the pickle was run',))


def pickled() -> bytes:
  out = io.BytesIO()
  np.lib.format.write_array(out, np.array([Trap()], object), allow_pickle=True)
  return zipped([('a.npy', out.getvalue())])


def safetensors(header: bytes, data: bytes = b'') -> bytes:
  return struct.pack('<Q', len(header)) + header + data


ENTRY = (
  b'PK\x01\x02\x14\x03\x14\x00'  # The start of an entry in a zip file's directory. Flags follow.
)
HOSTILE = {
  'nothing': lambda: b'',
  'HTML': lambda: b'<!DOCTYPE html><html><body>404 Not Found</body></html>',
  'a pickle': pickled,
  '16 TiB': lambda: zipped([('a.npy', claims((4, 1024, 1024, 1024, 1024)))]),
  'more elements than a machine word': lambda: zipped([('a.npy', claims((2**40, 2**40)))]),
  'a negative side': lambda: zipped([('a.npy', claims((-4,)))]),
  'a zip bomb': lambda: zipped(
    [('a.npy', member(np.zeros(2**26, np.float32)))], zipfile.ZIP_DEFLATED
  ),
  'a name twice': lambda: zipped(
    [('a.npy', member(np.ones(3))), ('b.npy', member(np.ones(3)))]
  ).replace(b'b.npy', b'a.npy'),
  'a photograph': lambda: zipped([('a.jpg', b'\xff\xd8\xff\xe0 no array')]),
  'an encrypted zip': lambda: zipped([('a.npy', member(np.ones(3)))]).replace(
    ENTRY + b'\x00', ENTRY + b'\x01'
  ),
  'a header that is code': lambda: zipped(
    [('a.npy', member(np.ones(3)).replace(b"'shape': (3,)", b"'shape': id(),"))]
  ),
  'safetensors of 16 TiB': lambda: safetensors(
    b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (2**42, 2**44)
  ),
  'a header longer than the file': lambda: struct.pack('<Q', 2**40) + b'{}',
  'overlapping tensors': lambda: safetensors(
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    b'0123',
  ),
  'no JSON': lambda: safetensors(b'{"a":'),
}


@pytest.mark.parametrize('make', HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_raises_one_line_within_a_second_and_20_mb(tmp_path, make):
  path = tmp_path / 'hostile.npz'
  path.write_bytes(make())
  before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
  tracemalloc.start()
  try:
    with pytest.raises(UserError) as error:
      dict(open_arrays(path))
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert time.process_time() - began < 1
  assert peak < 20e6
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200e3  # KiB.
  assert str(path) in str(error.value)
  assert '\n' not in str(error.value)


def test_member_names_with_paths_write_nothing(tmp_path):
  path = tmp_path / 'in' / 'model.npz'
  path.parent.mkdir()
  path.write_bytes(
    zipped([('../../up.npy', member(np.ones(3))), ('/etc/absolute.npy', member(np.ones(3)))])
  )
  assert set(open_arrays(path)) == {'../../up', '/etc/absolute'}
  assert sorted(tmp_path.rglob('*')) == [path.parent, path]


def valid_file(kind: str) -> bytes:
  """Return the bytes of a valid file."""
  out = io.BytesIO()
  SAVE[kind](out)
  return out.getvalue()


# Safetensors files have no checksum, so that damage of their data is undetectable.
VALID_FILES = {kind: valid_file(kind) for kind in SAVE if kind != 'safetensors'}


def read_all(path) -> dict[str, np.ndarray]:
  arrays = open_arrays(path)
  return {name: arrays[name] for name in arrays if name != 'opt/step'}


MANY = hypothesis.settings(
  max_examples=400,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize('kind', VALID_FILES)
@MANY
@hypothesis.given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_raise(kind, tmp_path, share):
  path = tmp_path / 'cut.npz'
  path.write_bytes(VALID_FILES[kind][: int(share * len(VALID_FILES[kind]))])
  with pytest.raises(UserError):
    read_all(path)


@pytest.mark.parametrize('kind', VALID_FILES)
@MANY
@hypothesis.given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_raises_or_changes_no_value(kind, tmp_path, share, bit):
  data = bytearray(VALID_FILES[kind])
  data[int(share * len(data))] ^= 1 << bit
  path = tmp_path / 'flipped.npz'
  path.write_bytes(data)
  try:
    found = read_all(path)
  except UserError:
    return
  # No reader uses this bit, such as a date in the zip file, or it is in a name.
  for name, array in found.items():
    if name in ARRAYS:
      np.testing.assert_array_equal(array, ARRAYS[name])
  assert len(found) == len(ARRAYS) - 1
