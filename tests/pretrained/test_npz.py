"""Reading released files: made here with every name of paper.md §7.2, then broken; and a real one if it is there."""

import zipfile

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.vit import vit
from vit_jax.pretrained.adapt import adapt
from vit_jax.pretrained.npz import read_npz
from vit_jax.step import abstract_params

# A file in the released layout: width 8, 2 heads, MLP 12, patches of 4 px for an image of 12 px, 5 classes.
BLOCK = {
  'LayerNorm_0/scale': (8,),
  'LayerNorm_0/bias': (8,),
  'MultiHeadDotProductAttention_1/query/kernel': (8, 2, 4),
  'MultiHeadDotProductAttention_1/query/bias': (2, 4),
  'MultiHeadDotProductAttention_1/key/kernel': (8, 2, 4),
  'MultiHeadDotProductAttention_1/key/bias': (2, 4),
  'MultiHeadDotProductAttention_1/value/kernel': (8, 2, 4),
  'MultiHeadDotProductAttention_1/value/bias': (2, 4),
  'MultiHeadDotProductAttention_1/out/kernel': (2, 4, 8),
  'MultiHeadDotProductAttention_1/out/bias': (8,),
  'LayerNorm_2/scale': (8,),
  'LayerNorm_2/bias': (8,),
  'MlpBlock_3/Dense_0/kernel': (8, 12),
  'MlpBlock_3/Dense_0/bias': (12,),
  'MlpBlock_3/Dense_1/kernel': (12, 8),
  'MlpBlock_3/Dense_1/bias': (8,),
}
REST = {
  'cls': (1, 1, 8),
  'embedding/kernel': (4, 4, 3, 8),
  'embedding/bias': (8,),
  'Transformer/posembed_input/pos_embedding': (1, 10, 8),
  'Transformer/encoder_norm/scale': (8,),
  'Transformer/encoder_norm/bias': (8,),
  'pre_logits/kernel': (8, 8),
  'pre_logits/bias': (8,),
  'head/kernel': (8, 5),
  'head/bias': (5,),
}
DEPTH = 12  # More than ten, so that an order of names as text would show.


def released(dtype=np.float32) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  blocks = {f'Transformer/encoderblock_{i}/{name}': shape for i in range(DEPTH) for name, shape in BLOCK.items()}
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in (blocks | REST).items()}


def model(**fields):
  return vit(ModelConfig(variant='mu/4', width=8, depth=DEPTH, mlp=12, heads=2, **fields), 5)


@pytest.fixture
def file(tmp_path):
  """Writes arrays and returns the path."""

  def write(arrays: dict, save=np.savez):
    save(tmp_path / 'released.npz', **arrays)
    return tmp_path / 'released.npz'

  return write


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_a_released_file_becomes_the_models_tree_with_stacked_blocks(file, save):
  arrays = released()
  params = flatten_dict(read_npz(file(arrays, save)), sep='/')
  expected = flatten_dict(abstract_params(model(hidden_head=True), (12, 12)), sep='/')
  assert {name: (array.shape, array.dtype) for name, array in params.items()} == {
    name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()
  }
  for name in REST:
    np.testing.assert_array_equal(params[name], arrays[name])
  for name in BLOCK:
    for i in range(DEPTH):
      stacked = params[f'Transformer/encoderblock/{name}']
      np.testing.assert_array_equal(stacked[i], arrays[f'Transformer/encoderblock_{i}/{name}'])


def test_the_order_in_the_file_does_not_matter(file):
  arrays = released()
  forwards, backwards = (read_npz(file(dict(order))) for order in (arrays.items(), reversed(arrays.items())))
  jax.tree.map(np.testing.assert_array_equal, forwards, backwards)


@pytest.mark.parametrize('dtype', [np.float16, np.float64])
def test_every_float_becomes_float32(file, dtype):
  arrays = released(dtype)
  params = read_npz(file(arrays))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float32')}
  np.testing.assert_array_equal(params['head']['kernel'], arrays['head/kernel'].astype(np.float32))


@pytest.mark.parametrize('missing', ['encoderblock_0/LayerNorm_2/bias', 'encoderblock_11/MlpBlock_3/Dense_0/kernel'])
def test_a_missing_array_of_a_block_is_named(file, missing):
  path = file({name: array for name, array in released().items() if not name.endswith(missing)})
  with pytest.raises(UserError) as error:
    read_npz(path)
  assert f'{path}: Transformer/{missing} is missing' in str(error.value)


def test_a_missing_block_is_named(file):
  path = file({name: array for name, array in released().items() if '/encoderblock_4/' not in name})
  with pytest.raises(UserError, match=r'Transformer/encoderblock_4/.* is missing'):
    read_npz(path)


def test_blocks_of_different_shapes_are_an_error_that_names_the_array(file):
  path = file(released() | {'Transformer/encoderblock_3/MlpBlock_3/Dense_0/bias': np.zeros(13)})
  with pytest.raises(UserError, match='MlpBlock_3/Dense_0/bias'):
    read_npz(path)


def test_a_file_that_is_no_vision_transformer_says_so(file):
  with pytest.raises(UserError, match='has no embedding/kernel'):
    read_npz(file({'conv1/kernel': np.zeros((3, 3, 3, 8))}))


def test_pickled_objects_are_refused_and_never_run(file):
  class Trap:
    def __reduce__(self):
      return (pytest.fail, ('the pickle was run',))

  trap = np.empty(1, object)
  trap[0] = Trap()
  with pytest.raises(UserError, match=r'not a readable \.npz'):
    read_npz(file(released() | {'cls': trap}))


def corrupt(data: bytes) -> bytes:
  """Other bytes in the middle, where the arrays are; the list of files at the end is whole."""
  middle = len(data) // 3
  return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 2000]) + data[middle + 2000 :]


BREAKS = {
  'nothing': lambda data: b'',
  'text': lambda data: b'<html>404 Not Found</html>',
  'the first half': lambda data: data[: len(data) // 2],
  'all but the last bytes': lambda data: data[:-30],
  'the start of a zip': lambda data: data[:4],
  'the end': lambda data: data[len(data) // 2 :],
  'other bytes inside': corrupt,
}


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed], ids=['plain', 'compressed'])
@pytest.mark.parametrize('damage', BREAKS.values(), ids=BREAKS)
def test_a_damaged_file_is_an_error_that_names_it(file, damage, save):
  path = file(released(), save)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UserError) as error:
    read_npz(path)
  assert str(path) in str(error.value)


def test_a_single_array_a_directory_and_a_missing_file_are_errors(tmp_path):
  with (tmp_path / 'array.npz').open('wb') as out:
    np.save(out, np.zeros(3))
  (tmp_path / 'directory.npz').mkdir()
  for name in ('array.npz', 'directory.npz', 'missing.npz'):
    with pytest.raises(UserError, match=name):
      read_npz(tmp_path / name)


def test_a_zip_of_other_files_is_an_error(tmp_path):
  with zipfile.ZipFile(tmp_path / 'photos.npz', 'w') as out:
    out.writestr('photo.jpg', b'not an array')
  with pytest.raises(UserError, match=r'photos\.npz'):
    read_npz(tmp_path / 'photos.npz')


def test_a_real_released_file_fits_its_model(shared):
  path = shared / 'vit_s14_google_keys_f16.npz'
  if not path.is_file():
    pytest.skip(f'no {path}')
  loaded = read_npz(path)
  s14 = vit(ModelConfig(variant='S/14', gelu='erf'), 5)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(s14, (224, 224)))
  out, notes = adapt(loaded, params, grid=(16, 16))
  assert sorted(notes) == ['head/bias [5] new', 'head/kernel [384, 5] new']
  assert jax.tree.map(np.shape, out) == jax.tree.map(np.shape, params)
  # Trained: every norm's scale is positive on the whole, and no two blocks are alike.
  scales = out['Transformer']['encoderblock']['LayerNorm_0']['scale']
  assert scales.shape == (12, 384)
  assert np.all(scales.mean(axis=1) > 0)
  assert len(np.unique(scales[:, 0])) == 12
