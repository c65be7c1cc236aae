"""Adaptation to another task and resolution, compared with scipy's zoom as in the paper's code."""

import jax
import numpy as np
import pytest
import scipy.ndimage
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.pretrained.released_layout import draw
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.vit import build_vit
from vit_jax.pretrained.adapt import ArrayChange, adapt_params, format_changes
from vit_jax.pretrained.arrays import PATCH_KERNEL, POSITION_EMBEDDING, RELATIVE_TABLE
from vit_jax.pretrained.resample import (
  RESAMPLE_METHODS,
  pi_resize,
  resample_grid,
  resample_offsets,
  resample_positions,
)
from vit_jax.step import abstract_params

RNG = np.random.default_rng(0)

# First the paper's grids (§3.2), then smaller, non-square, one row, one patch.
GRIDS = [
  ((14, 14), (24, 24)), ((7, 7), (12, 12)), ((16, 16), (27, 27)), ((14, 14), (32, 32)),
  ((16, 16), (37, 37)),
  ((24, 24), (14, 14)), ((7, 7), (4, 4)), ((7, 7), (8, 8)), ((2, 2), (9, 9)), ((14, 14), (2, 2)),
  ((3, 8), (6, 5)), ((10, 4), (4, 10)), ((5, 9), (5, 3)), ((6, 6), (6, 13)),
  ((1, 5), (4, 5)), ((1, 1), (3, 2)), ((5, 5), (1, 1)), ((3, 4), (1, 8)),
]  # fmt: skip


def zoom(table: np.ndarray, grid) -> np.ndarray:
  return scipy.ndimage.zoom(table, (grid[0] / table.shape[0], grid[1] / table.shape[1], 1), order=1)


@pytest.mark.parametrize(('old', 'new'), GRIDS, ids=str)
def test_corner_resampling_equals_scipy_zoom(old, new):
  table = RNG.normal(size=(*old, 3))
  positions = table.reshape(1, -1, 3).astype(np.float32)
  out = resample_positions(positions, new[0] * new[1], new, old)
  assert out.dtype == np.float32
  np.testing.assert_allclose(out[0], zoom(table, new).reshape(-1, 3), rtol=0, atol=1e-6)


def test_relative_positions_and_both_tokens_of_distillation_fit_another_grid():
  tables = {'relative2d': RELATIVE_TABLE, 'learned': POSITION_EMBEDDING}
  for position, name in tables.items():
    distilled = position == 'learned'
    config = ModelConfig(variant='mu/8', depth=2, position=position, distillation_token=distilled)
    loaded, new = (draw(config, 5, size) for size in ((32, 32), (48, 64)))
    trees = (unflatten_dict(flat, sep='/') for flat in (loaded, new))
    adapted, changes = adapt_params(*trees, grid=(6, 8), old_grid=(4, 4))
    got = flatten_dict(adapted, sep='/')[name]
    assert got.shape == new[name].shape
    if distilled:
      expected = resample_positions(loaded[name], 2 + 48, (6, 8), (4, 4))
      np.testing.assert_array_equal(got[:, :2], loaded[name][:, :2])
    else:
      expected = resample_offsets(loaded[name], (6, 8), (4, 4))
    np.testing.assert_array_equal(got, expected)
    assert [change.action for change in changes if change.name == name] == ['resampled']


def test_resampling_keeps_the_class_token_row_exactly():
  table = RNG.normal(size=(1, 1 + 49, 4)).astype(np.float32)
  out = resample_positions(table, 1 + 144, (12, 12))
  assert out.shape == (1, 145, 4)
  np.testing.assert_array_equal(out[:, :1], table[:, :1])
  expected = zoom(table[0, 1:].reshape(7, 7, 4), (12, 12))
  np.testing.assert_allclose(out[0, 1:], expected.reshape(-1, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ('extra', 'grid', 'old'), [(1, (7, 7), None), (0, (3, 8), (3, 8)), (1, (4, 6), (4, 6))]
)
def test_an_unchanged_grid_returns_the_same_table(extra, grid, old):
  table = RNG.normal(size=(1, extra + grid[0] * grid[1], 4)).astype(np.float32)
  assert resample_positions(table, table.shape[1], grid, old) is table


def test_a_grid_of_equal_size_but_other_shape_is_resampled():
  table = RNG.normal(size=(1, 24, 2)).astype(np.float32)
  out = resample_positions(table, 24, (6, 4), (3, 8))
  np.testing.assert_allclose(
    out[0], zoom(table[0].reshape(3, 8, 2), (6, 4)).reshape(-1, 2), rtol=0, atol=1e-6
  )


@pytest.mark.parametrize(
  ('old_tokens', 'new_tokens', 'grid', 'old_grid'),
  [
    (49, 1 + 49, (7, 7), None),  # The model has a class token, the file has none.
    (1 + 49, 49, (7, 7), None),  # The file has a class token, the model has none.
    (1 + 24, 1 + 49, (7, 7), None),  # Not the default square.
    (1 + 24, 1 + 49, (7, 7), (5, 5)),
  ],
)
def test_position_counts_that_match_no_grid_raise(old_tokens, new_tokens, grid, old_grid):
  with pytest.raises(UserError, match=f'{old_tokens} position embeddings'):
    resample_positions(np.zeros((1, old_tokens, 2), np.float32), new_tokens, grid, old_grid)


def params_of(*, size: tuple[int, int], classes: int, seed: int, patch: int = 4, **fields) -> dict:
  """Return random parameters of a tiny model."""
  rng = np.random.default_rng(seed)
  model = build_vit(
    ModelConfig(variant=f'mu/{patch}', width=8, depth=2, mlp=12, heads=2, **fields), classes
  )
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(model, size)
  )


def flat(tree: dict) -> dict:
  return flatten_dict(tree, sep='/')


def test_a_new_task_replaces_only_the_head():
  old = params_of(size=(8, 8), classes=7, seed=0, hidden_head=True)
  new = params_of(size=(8, 8), classes=3, seed=1)
  out, changes = adapt_params(old, new, grid=(2, 2))
  assert flat(out).keys() == flat(new).keys()
  for path, array in flat(out).items():
    source = new if path.startswith('head/') else old
    assert array is flat(source)[path], path
  assert {change.name: change.action for change in changes if change.action != 'kept'} == {
    'head/bias': 'new',
    'head/kernel': 'new',
    'pre_logits/bias': 'dropped',
    'pre_logits/kernel': 'dropped',
  }
  assert {change.name for change in changes} == flat(old).keys() | flat(
    new
  ).keys()  # Every array is listed.
  assert format_changes(changes) == [
    'head/bias          new      [7] -> [3]',
    'head/kernel        new      [8, 7] -> [8, 3]',
    'pre_logits/bias    dropped  [8]',
    'pre_logits/kernel  dropped  [8, 8]',
    f'{len(flat(new)) - 2} arrays kept',
  ]


def test_the_hidden_layer_of_the_head_is_replaced():
  old, new = (params_of(size=(8, 8), classes=7, seed=seed, hidden_head=True) for seed in (0, 1))
  out, changes = adapt_params(old, new, grid=(2, 2))
  for path in ('head/kernel', 'head/bias', 'pre_logits/kernel', 'pre_logits/bias'):
    assert flat(out)[path] is flat(new)[path]
    assert ArrayChange(path, 'new', flat(old)[path].shape, flat(new)[path].shape) in changes


def test_keep_head_keeps_every_array():
  old, new = (params_of(size=(8, 8), classes=7, seed=seed, hidden_head=True) for seed in (0, 1))
  out, changes = adapt_params(old, new, grid=(2, 2), keep_head=True)
  assert all(flat(out)[path] is array for path, array in flat(old).items())
  assert {change.action for change in changes} == {'kept'}


def test_keep_head_with_another_number_of_classes_raises():
  old, new = (params_of(size=(8, 8), classes=classes, seed=0) for classes in (1200, 3))
  with pytest.raises(UserError, match='1,200 classes'):
    adapt_params(old, new, grid=(2, 2), keep_head=True)


@pytest.mark.parametrize(
  ('old_hidden', 'new_hidden', 'message'),
  [
    (True, False, 'pre_logits/kernel'),
    (False, True, 'pre_logits/kernel'),
  ],
)
def test_keep_head_requires_the_same_hidden_layer(old_hidden, new_hidden, message):
  old, new = (
    params_of(size=(8, 8), classes=7, seed=0, hidden_head=hidden)
    for hidden in (old_hidden, new_hidden)
  )
  with pytest.raises(UserError, match=message):
    adapt_params(old, new, grid=(2, 2), keep_head=True)


def test_keep_head_without_a_head_in_the_file_raises():
  old, new = (params_of(size=(8, 8), classes=3, seed=seed) for seed in (0, 1))
  del old['head']
  with pytest.raises(UserError, match='head/kernel'):
    adapt_params(old, new, grid=(2, 2), keep_head=True)


@pytest.mark.parametrize('method', RESAMPLE_METHODS)
def test_resample_positions_uses_the_given_method(method):
  positions = RNG.normal(size=(1, 1 + 9, 4)).astype(np.float32)
  out = resample_positions(positions, 1 + 30, (5, 6), method=method)
  expected = resample_grid(positions[0, 1:].reshape(3, 3, 4), (5, 6), method)
  np.testing.assert_array_equal(out[0, 1:], expected.reshape(30, 4))
  np.testing.assert_array_equal(out[:, :1], positions[:, :1])


def test_another_patch_size_resizes_only_the_patch_kernel():
  old = params_of(size=(8, 8), classes=3, seed=0, registers=2)
  new = params_of(size=(12, 12), classes=3, seed=1, registers=2, patch=6)  # The same grid of 2x2.
  out, changes = adapt_params(old, new, grid=(2, 2))
  np.testing.assert_array_equal(flat(out)[PATCH_KERNEL], pi_resize(flat(old)[PATCH_KERNEL], (6, 6)))
  assert all(
    flat(out)[name] is flat(old)[name] for name in ('registers', 'cls', POSITION_EMBEDDING)
  )
  assert ArrayChange(PATCH_KERNEL, 'PI-resized', (4, 4, 3, 8), (6, 6, 3, 8)) in changes


def test_a_file_without_a_head_is_adapted():
  old, new = (params_of(size=(8, 8), classes=3, seed=seed) for seed in (0, 1))
  del old['head']
  out, changes = adapt_params(old, new, grid=(2, 2))
  assert out['head'] == new['head']
  assert {
    change.name: (change.action, change.old_shape) for change in changes if change.action != 'kept'
  } == {
    'head/bias': ('new', None),
    'head/kernel': ('new', None),
  }


@pytest.mark.parametrize(
  ('old_size', 'old_grid', 'size', 'grid'),
  [((8, 8), None, (12, 12), (3, 3)), ((8, 12), (2, 3), (16, 8), (4, 2))],
)
def test_another_image_size_resamples_only_the_positions(old_size, old_grid, size, grid):
  old, new = (params_of(size=s, classes=3, seed=0) for s in (old_size, size))
  out, changes = adapt_params(old, new, grid=grid, old_grid=old_grid)
  after, before = flat(out)[POSITION_EMBEDDING], flat(old)[POSITION_EMBEDDING]
  rows, columns = old_grid or (2, 2)
  expected = zoom(before[0, 1:].reshape(rows, columns, 8), grid).reshape(-1, 8)
  np.testing.assert_allclose(after[0, 1:], expected, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(after[:, 0], before[:, 0])
  assert ArrayChange(POSITION_EMBEDDING, 'resampled', before.shape, after.shape) in changes
  others = {
    path for path in flat(new) if path != POSITION_EMBEDDING and not path.startswith('head/')
  }
  assert all(flat(out)[path] is flat(old)[path] for path in others)


def without(path: str):
  return lambda tree: {name: array for name, array in tree.items() if name != path}


CLS, QUERY = 'cls', 'Transformer/encoderblock/MultiHeadDotProductAttention_1/query/kernel'
MISFITS = [
  # Change of the file -> parts of the message.
  (without(CLS), ['cls']),
  (lambda tree: tree | {'more': np.zeros((1, 2, 8))}, ['more [1, 2, 8]']),
  (
    lambda tree: tree | {CLS: np.zeros((1, 1, 6))},
    ['cls', '[1, 1, 6]', '[1, 1, 8]'],
  ),
  (
    lambda tree: tree | {QUERY: tree[QUERY][:1]},
    [QUERY, '[1, 8, 2, 4]', '[2, 8, 2, 4]'],
  ),
  (
    lambda tree: without(CLS)(tree) | {'mask': np.zeros(3)},
    ['cls', 'mask [3]'],
  ),
  (without('registers'), ['registers']),
  (
    without(POSITION_EMBEDDING),
    [POSITION_EMBEDDING],
  ),  # A model with sinusoidal positions, or none.
  (
    lambda tree: tree | {PATCH_KERNEL: np.zeros((1, 1, 64, 8))},
    [PATCH_KERNEL, '[1, 1, 64, 8]'],
  ),  # The patch kernel of a hybrid.
  (
    lambda tree: tree | {POSITION_EMBEDDING: tree[POSITION_EMBEDDING][..., :6]},
    [POSITION_EMBEDDING, '[1, 5, 6]', '[1, 5, 8]'],
  ),
  (
    lambda tree: tree | {f'more_{i}': np.zeros(1) for i in range(8)},
    ['more_0', 'more_4', 'and 3 more'],
  ),
]


@pytest.mark.parametrize(('change', 'messages'), MISFITS, ids=['-'.join(row[1]) for row in MISFITS])
def test_arrays_that_do_not_fit_are_listed(change, messages):
  params = params_of(size=(8, 8), classes=3, seed=0, registers=2)
  loaded = unflatten_dict(change(flat(params)), sep='/')
  with pytest.raises(UserError) as error:
    adapt_params(loaded, params, grid=(2, 2))
  assert all(message in str(error.value) for message in ('config.init', 'config.model', *messages))


SCALES = ('attention_scale', 'mlp_scale')


@pytest.mark.parametrize(
  ('stored', 'wanted', 'action'),
  [
    ({'layer_scale': 0.1}, {}, 'folded in'),
    ({'layer_scale': 0.1}, {'layer_scale': 0.5}, 'kept'),
    ({}, {'layer_scale': 0.5}, 'new'),
  ],
)
def test_layer_scale_that_a_model_lacks_or_adds_changes_no_output(stored, wanted, action):
  old = params_of(size=(8, 8), classes=3, seed=0, **stored)
  new = params_of(size=(8, 8), classes=3, seed=1, **wanted)
  out, changes = adapt_params(old, new, grid=(2, 2), keep_head=True)
  actions = {change.name.rpartition('/')[2]: change.action for change in changes}
  assert {actions[name] for name in SCALES} == {action}
  assert_equal_logits(old, stored, out, wanted)


def test_biases_that_only_the_new_model_has_are_zeros():
  fields = {'qkv_bias': 'none', 'patch_bias': False}
  old = params_of(size=(8, 8), classes=3, seed=0, **fields)
  new = params_of(size=(8, 8), classes=3, seed=1)
  out, _ = adapt_params(old, new, grid=(2, 2), keep_head=True)
  assert_equal_logits(old, fields, out, {})


def assert_equal_logits(old: dict, old_fields: dict, new: dict, new_fields: dict):
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  logits = [
    build_vit(ModelConfig(variant='mu/4', width=8, depth=2, mlp=12, heads=2, **fields), 3).apply(
      {'params': params}, images
    )
    for params, fields in ((old, old_fields), (new, new_fields))
  ]
  np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


def test_adapt_params_does_not_modify_its_arguments():
  old, new = params_of(size=(8, 8), classes=7, seed=0), params_of(size=(12, 12), classes=3, seed=1)
  before = jax.tree.map(np.copy, (old, new))
  adapt_params(old, new, grid=(3, 3))
  jax.tree.map(np.testing.assert_array_equal, (old, new), before)
