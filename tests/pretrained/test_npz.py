"""Google's .npz layouts: files with every name of paper.md §7.2, damaged files, and a real file."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.pretrained.released_layout import draw
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.vit import build_vit
from vit_jax.pretrained.adapt import adapt_params
from vit_jax.pretrained.arrays import open_arrays
from vit_jax.pretrained.npz import read_google, to_google
from vit_jax.step import abstract_params

# A file in the released layout: width 8, 2 heads, MLP 12, patches of 4 px for an image of 12 px, 5
# classes.
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
DEPTH = 12  # More than ten, so that sorting names as text would be wrong.


def released(dtype=np.float32) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  blocks = {
    f'Transformer/encoderblock_{i}/{name}': shape
    for i in range(DEPTH)
    for name, shape in BLOCK.items()
  }
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in (blocks | REST).items()}


def read_npz(path) -> dict:
  """Read a file as a nested tree."""
  return unflatten_dict(read_google(open_arrays(path))[0], sep='/')


def model(**fields):
  return build_vit(ModelConfig(variant='mu/4', width=8, depth=DEPTH, mlp=12, heads=2, **fields), 5)


@pytest.fixture
def file(tmp_path):
  """Return a function that writes arrays and returns the path."""

  def write(arrays: dict, save=np.savez):
    save(tmp_path / 'released.npz', **arrays)
    return tmp_path / 'released.npz'

  return write


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_a_released_file_is_read_with_stacked_blocks(file, save):
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


def test_the_order_of_arrays_in_the_file_is_irrelevant(file):
  arrays = released()
  forwards, backwards = (
    read_npz(file(dict(order))) for order in (arrays.items(), reversed(arrays.items()))
  )
  jax.tree.map(np.testing.assert_array_equal, forwards, backwards)


@pytest.mark.parametrize('dtype', [np.float16, np.float64])
def test_all_floats_are_converted_to_float32(file, dtype):
  arrays = released(dtype)
  params = read_npz(file(arrays))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float32')}
  np.testing.assert_array_equal(params['head']['kernel'], arrays['head/kernel'].astype(np.float32))


@pytest.mark.parametrize(
  'missing', ['encoderblock_0/LayerNorm_2/bias', 'encoderblock_11/MlpBlock_3/Dense_0/kernel']
)
def test_a_missing_array_of_a_block_is_named_in_the_error(file, missing):
  path = file({name: array for name, array in released().items() if not name.endswith(missing)})
  with pytest.raises(UserError) as error:
    read_npz(path)
  number, name = missing.removeprefix('encoderblock_').split('/', 1)
  assert all(part in str(error.value) for part in (str(path), f'block {number}', name))


def test_a_missing_block_raises(file):
  path = file({name: array for name, array in released().items() if '/encoderblock_4/' not in name})
  with pytest.raises(UserError, match='block 11'):
    read_npz(path)


def test_shapes_that_differ_between_blocks_raise(file):
  path = file(released() | {'Transformer/encoderblock_3/MlpBlock_3/Dense_0/bias': np.zeros(13)})
  with pytest.raises(UserError, match='MlpBlock_3/Dense_0/bias'):
    read_npz(path)


@pytest.mark.parametrize('prefix', ['', 'opt/target/', 'params/', 'params/img/', 'target/', 'img/'])
def test_the_model_is_found_under_every_prefix_and_other_arrays_are_noted(file, prefix):
  arrays = {prefix + name: array for name, array in released().items()}
  others = {'opt/state/step': np.array(3), 't': np.zeros(1)} if prefix else {}
  flat, facts = read_google(open_arrays(file(arrays | others)))
  plain, _ = read_google(open_arrays(file(released())))
  assert flat.keys() == plain.keys()
  assert all(np.array_equal(flat[name], plain[name]) for name in flat)
  assert facts['notes'] == ((f'2 arrays outside {prefix} are ignored',) if prefix else ())


def test_newer_layer_names_are_read_like_older_ones(file):
  newer = {'LayerNorm_2': 'LayerNorm_1', 'MlpBlock_3': 'MlpBlock_0'}
  newer['MultiHeadDotProductAttention_1'] = 'MultiHeadDotProductAttention_0'
  arrays = released()
  for old, new in newer.items():
    arrays = {name.replace(old, new): array for name, array in arrays.items()}
  jax.tree.map(np.testing.assert_array_equal, read_npz(file(arrays)), read_npz(file(released())))


def test_a_layer_under_two_names_raises(file):
  twice = {'Transformer/encoderblock_0/LayerNorm_1/scale': np.ones(8, np.float32)}
  with pytest.raises(UserError, match='LayerNorm_2/scale'):
    read_npz(file(released() | twice))


@pytest.mark.parametrize(
  'fields', [{}, {'hidden_head': True}, {'pool': 'gap'}, {'pool': 'map'}], ids=str
)
@pytest.mark.parametrize('variant', ['mu/4', 'R1.1+mu/8', 'R+mu/16'])
def test_reading_and_writing_a_file_preserves_every_bit(file, variant, fields):
  stem = {'stem_width': 32} if '+' in variant else {}
  size = (64, 64) if variant == 'R+mu/16' else (16, 16)
  original = to_google(draw(ModelConfig(variant=variant, depth=2, **stem, **fields), 5, size))
  again = to_google(read_google(open_arrays(file(original)))[0])
  assert again.keys() == original.keys()
  for name, array in original.items():
    assert again[name].shape == array.shape
    assert again[name].tobytes() == array.tobytes()


@pytest.mark.parametrize('fields', [{'registers': 2}, {'patch_norm': True}], ids=str)
def test_arrays_without_a_google_name_are_not_written(fields):
  with pytest.raises(UserError, match='registers|embedding/norm_'):
    to_google(draw(ModelConfig(variant='mu/4', **fields), 5, (16, 16)))


def test_a_real_file_in_google_names_fits_its_model(shared):
  path = shared / 'vit_s14_google_keys_f16.npz'
  if not path.is_file():
    pytest.skip(f'no {path}')
  loaded = read_npz(path)
  s14 = build_vit(ModelConfig(variant='S/14', gelu='erf'), 5)
  params = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(s14, (224, 224))
  )
  out, changes = adapt_params(loaded, params, grid=(16, 16))
  assert {change.name for change in changes if change.action != 'kept'} == {
    'head/bias',
    'head/kernel',
  }
  assert jax.tree.map(np.shape, out) == jax.tree.map(np.shape, params)
  # In a trained model, norm scales are positive on average, and no two blocks are equal.
  scales = out['Transformer']['encoderblock']['LayerNorm_0']['scale']
  assert scales.shape == (12, 384)
  assert np.all(scales.mean(axis=1) > 0)
  assert len(np.unique(scales[:, 0])) == 12
