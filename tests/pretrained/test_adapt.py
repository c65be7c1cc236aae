"""Fitting parameters to another task and resolution, against scipy's zoom, which the paper's own code used."""

import jax
import numpy as np
import pytest
import scipy.ndimage
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.vit import build_vit
from vit_jax.pretrained.adapt import (
  PATCH_KERNEL,
  POSITION_EMBEDDING,
  ArrayChange,
  adapt_params,
  format_changes,
)
from vit_jax.pretrained.resample import (
  RESAMPLE_METHODS,
  pi_resize,
  resample_grid,
  resample_positions,
)
from vit_jax.step import abstract_params

RNG = np.random.default_rng(0)

# The paper's (§3.2): 14 -> 24, 7 -> 12, 16 -> 27, 14 -> 32, 16 -> 37. Then smaller, non-square, one row, one patch.
GRIDS = [
  ((14, 14), (24, 24)), ((7, 7), (12, 12)), ((16, 16), (27, 27)), ((14, 14), (32, 32)), ((16, 16), (37, 37)),
  ((24, 24), (14, 14)), ((7, 7), (4, 4)), ((7, 7), (8, 8)), ((2, 2), (9, 9)), ((14, 14), (2, 2)),
  ((3, 8), (6, 5)), ((10, 4), (4, 10)), ((5, 9), (5, 3)), ((6, 6), (6, 13)),
  ((1, 5), (4, 5)), ((1, 1), (3, 2)), ((5, 5), (1, 1)), ((3, 4), (1, 8)),
]  # fmt: skip


def zoom(table: np.ndarray, grid) -> np.ndarray:
  return scipy.ndimage.zoom(table, (grid[0] / table.shape[0], grid[1] / table.shape[1], 1), order=1)


@pytest.mark.parametrize(('old', 'new'), GRIDS, ids=str)
def test_resampling_equals_scipys_corner_aligned_zoom(old, new):
  table = RNG.normal(size=(*old, 3))
  positions = table.reshape(1, -1, 3).astype(np.float32)
  out = resample_positions(positions, new[0] * new[1], new, old)
  assert out.dtype == np.float32
  np.testing.assert_allclose(out[0], zoom(table, new).reshape(-1, 3), rtol=0, atol=1e-6)


def test_the_class_tokens_row_is_kept_bit_for_bit():
  table = RNG.normal(size=(1, 1 + 49, 4)).astype(np.float32)
  out = resample_positions(table, 1 + 144, (12, 12))
  assert out.shape == (1, 145, 4)
  np.testing.assert_array_equal(out[:, :1], table[:, :1])
  expected = zoom(table[0, 1:].reshape(7, 7, 4), (12, 12))
  np.testing.assert_allclose(out[0, 1:], expected.reshape(-1, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ('extra', 'grid', 'old'), [(1, (7, 7), None), (0, (3, 8), (3, 8)), (1, (4, 6), (4, 6))]
)
def test_the_same_grid_keeps_the_very_same_table(extra, grid, old):
  table = RNG.normal(size=(1, extra + grid[0] * grid[1], 4)).astype(np.float32)
  assert resample_positions(table, table.shape[1], grid, old) is table


def test_a_grid_of_as_many_patches_in_another_shape_is_resampled():
  table = RNG.normal(size=(1, 24, 2)).astype(np.float32)
  out = resample_positions(table, 24, (6, 4), (3, 8))
  np.testing.assert_allclose(
    out[0], zoom(table[0].reshape(3, 8, 2), (6, 4)).reshape(-1, 2), rtol=0, atol=1e-6
  )


@pytest.mark.parametrize(
  ('tokens_then', 'tokens_now', 'grid', 'old_grid'),
  [
    (49, 1 + 49, (7, 7), None),  # A class token now, none then.
    (1 + 49, 49, (7, 7), None),  # The other way round.
    (1 + 24, 1 + 49, (7, 7), None),  # Not a square, and nobody said which.
    (1 + 24, 1 + 49, (7, 7), (5, 5)),
  ],
)
def test_positions_that_do_not_work_out_are_an_error(tokens_then, tokens_now, grid, old_grid):
  with pytest.raises(UserError, match=f'{tokens_then} position embeddings are not'):
    resample_positions(np.zeros((1, tokens_then, 2), np.float32), tokens_now, grid, old_grid)


def params_of(*, size: tuple[int, int], classes: int, seed: int, patch: int = 4, **fields) -> dict:
  """Random parameters of a tiny model."""
  rng = np.random.default_rng(seed)
  model = build_vit(
    ModelConfig(variant=f'mu/{patch}', width=8, depth=2, mlp=12, heads=2, **fields), classes
  )
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(model, size)
  )


def flat(tree: dict) -> dict:
  return flatten_dict(tree, sep='/')


def test_a_new_task_at_the_same_size_gets_a_new_head_and_all_else_as_it_was():
  old = params_of(size=(8, 8), classes=7, seed=0, hidden_head=True)
  new = params_of(size=(8, 8), classes=3, seed=1)
  out, changes = adapt_params(old, new, grid=(2, 2))
  assert flat(out).keys() == flat(new).keys()
  for path, array in flat(out).items():
    source = new if path.startswith('head/') else old
    assert array is flat(source)[path], path
  assert {change.name: change.what for change in changes if change.what != 'kept'} == {
    'head/bias': 'new',
    'head/kernel': 'new',
    'pre_logits/bias': 'dropped',
    'pre_logits/kernel': 'dropped',
  }
  assert {change.name for change in changes} == flat(old).keys() | flat(
    new
  ).keys()  # Every array has its line.
  assert format_changes(changes) == [
    'head/bias          new      [7] -> [3]',
    'head/kernel        new      [8, 7] -> [8, 3]',
    'pre_logits/bias    dropped  [8]',
    'pre_logits/kernel  dropped  [8, 8]',
    f'{len(flat(new)) - 2} arrays kept',
  ]


def test_the_hidden_layer_of_the_head_is_new_even_where_the_file_has_one():
  old, new = (params_of(size=(8, 8), classes=7, seed=seed, hidden_head=True) for seed in (0, 1))
  out, changes = adapt_params(old, new, grid=(2, 2))
  for path in ('head/kernel', 'head/bias', 'pre_logits/kernel', 'pre_logits/bias'):
    assert flat(out)[path] is flat(new)[path]
    assert ArrayChange(path, 'new', flat(old)[path].shape, flat(new)[path].shape) in changes


def test_a_head_is_kept_where_that_is_asked_for():
  old, new = (params_of(size=(8, 8), classes=7, seed=seed, hidden_head=True) for seed in (0, 1))
  out, changes = adapt_params(old, new, grid=(2, 2), keep_head=True)
  assert all(flat(out)[path] is array for path, array in flat(old).items())
  assert {change.what for change in changes} == {'kept'}


def test_a_head_of_other_classes_can_not_be_kept():
  old, new = (params_of(size=(8, 8), classes=classes, seed=0) for classes in (1200, 3))
  with pytest.raises(UserError, match='the head of config.init has 1,200 classes and this task 3'):
    adapt_params(old, new, grid=(2, 2), keep_head=True)


@pytest.mark.parametrize(
  ('old_hidden', 'new_hidden', 'message'),
  [
    (True, False, r'pre_logits/kernel \[8, 8\] is not in the model'),
    (False, True, 'pre_logits/kernel is not in the file'),
  ],
)
def test_a_head_is_kept_with_its_hidden_layer_or_not_at_all(old_hidden, new_hidden, message):
  old, new = (
    params_of(size=(8, 8), classes=7, seed=0, hidden_head=hidden)
    for hidden in (old_hidden, new_hidden)
  )
  with pytest.raises(UserError, match=message):
    adapt_params(old, new, grid=(2, 2), keep_head=True)


def test_a_head_that_the_file_does_not_have_can_not_be_kept():
  old, new = (params_of(size=(8, 8), classes=3, seed=seed) for seed in (0, 1))
  del old['head']
  with pytest.raises(UserError, match='head/kernel is not in the file'):
    adapt_params(old, new, grid=(2, 2), keep_head=True)


@pytest.mark.parametrize('method', RESAMPLE_METHODS)
def test_positions_are_resampled_by_the_method_that_is_named(method):
  positions = RNG.normal(size=(1, 1 + 9, 4)).astype(np.float32)
  out = resample_positions(positions, 1 + 30, (5, 6), method=method)
  expected = resample_grid(positions[0, 1:].reshape(3, 3, 4), (5, 6), method)
  np.testing.assert_array_equal(out[0, 1:], expected.reshape(30, 4))
  np.testing.assert_array_equal(out[:, :1], positions[:, :1])


def test_patches_of_another_size_are_resized_by_the_pseudo_inverse_and_registers_left_alone():
  old = params_of(size=(8, 8), classes=3, seed=0, registers=2)
  new = params_of(size=(12, 12), classes=3, seed=1, registers=2, patch=6)  # The same grid of 2x2.
  out, changes = adapt_params(old, new, grid=(2, 2))
  np.testing.assert_array_equal(flat(out)[PATCH_KERNEL], pi_resize(flat(old)[PATCH_KERNEL], (6, 6)))
  assert all(
    flat(out)[name] is flat(old)[name] for name in ('registers', 'cls', POSITION_EMBEDDING)
  )
  assert ArrayChange(PATCH_KERNEL, 'PI-resized', (4, 4, 3, 8), (6, 6, 3, 8)) in changes


def test_a_file_without_a_head_fits():
  old, new = (params_of(size=(8, 8), classes=3, seed=seed) for seed in (0, 1))
  del old['head']
  out, changes = adapt_params(old, new, grid=(2, 2))
  assert out['head'] == new['head']
  assert {
    change.name: (change.what, change.old) for change in changes if change.what != 'kept'
  } == {
    'head/bias': ('new', None),
    'head/kernel': ('new', None),
  }


@pytest.mark.parametrize(
  ('old_size', 'old_grid', 'size', 'grid'),
  [((8, 8), None, (12, 12), (3, 3)), ((8, 12), (2, 3), (16, 8), (4, 2))],
)
def test_another_size_resamples_the_positions_and_says_so(old_size, old_grid, size, grid):
  old, new = (params_of(size=s, classes=3, seed=0) for s in (old_size, size))
  out, changes = adapt_params(old, new, grid=grid, old_grid=old_grid)
  now, then = flat(out)[POSITION_EMBEDDING], flat(old)[POSITION_EMBEDDING]
  rows, columns = old_grid or (2, 2)
  expected = zoom(then[0, 1:].reshape(rows, columns, 8), grid).reshape(-1, 8)
  np.testing.assert_allclose(now[0, 1:], expected, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(now[:, 0], then[:, 0])
  assert ArrayChange(POSITION_EMBEDDING, 'resampled', then.shape, now.shape) in changes
  others = {
    path for path in flat(new) if path != POSITION_EMBEDDING and not path.startswith('head/')
  }
  assert all(flat(out)[path] is flat(old)[path] for path in others)


def without(path: str):
  return lambda tree: {name: array for name, array in tree.items() if name != path}


CLS, QUERY = 'cls', 'Transformer/encoderblock/MultiHeadDotProductAttention_1/query/kernel'
MISFITS = [
  # What is done to the file -> what the error says.
  (without(CLS), ['cls is not in the file']),
  (lambda tree: tree | {'more': np.zeros((1, 2, 8))}, ['more [1, 2, 8] is not in the model']),
  (
    lambda tree: tree | {CLS: np.zeros((1, 1, 6))},
    ['cls is [1, 1, 6] in the file, [1, 1, 8] in the model'],
  ),
  (
    lambda tree: tree | {QUERY: tree[QUERY][:1]},
    [f'{QUERY} is [1, 8, 2, 4] in the file, [2, 8, 2, 4] in the model'],
  ),
  (
    lambda tree: without(CLS)(tree) | {'mask': np.zeros(3)},
    ['cls is not in the file', 'mask [3] is not in the model'],
  ),
  (without('registers'), ['registers is not in the file']),
  (
    without(POSITION_EMBEDDING),
    [f'{POSITION_EMBEDDING} is not in the file'],
  ),  # Of a model with sinusoidal positions, or none.
  (
    lambda tree: tree | {PATCH_KERNEL: np.zeros((1, 1, 64, 8))},
    [f'{PATCH_KERNEL} is [1, 1, 64, 8] in the file'],
  ),  # A hybrid's.
  (
    lambda tree: tree | {POSITION_EMBEDDING: tree[POSITION_EMBEDDING][..., :6]},
    [POSITION_EMBEDDING, '[1, 5, 6]', '[1, 5, 8]'],
  ),
  (
    lambda tree: tree | {f'more_{i}': np.zeros(1) for i in range(8)},
    ['more_0', 'more_4', 'and 3 more'],
  ),
]


@pytest.mark.parametrize(('change', 'messages'), MISFITS, ids=[row[1][0] for row in MISFITS])
def test_what_does_not_fit_is_an_error_that_lists_it(change, messages):
  params = params_of(size=(8, 8), classes=3, seed=0, registers=2)
  loaded = unflatten_dict(change(flat(params)), sep='/')
  with pytest.raises(UserError) as error:
    adapt_params(loaded, params, grid=(2, 2))
  assert all(
    message in str(error.value) for message in ('config.init does not fit config.model', *messages)
  )


def test_neither_tree_is_changed():
  old, new = params_of(size=(8, 8), classes=7, seed=0), params_of(size=(12, 12), classes=3, seed=1)
  before = jax.tree.map(np.copy, (old, new))
  adapt_params(old, new, grid=(3, 3))
  jax.tree.map(np.testing.assert_array_equal, (old, new), before)
