"""Position embeddings: which settings go together, and what is looked at is what was computed. Their numbers: test_vit.py."""

import dataclasses

import jax
import numpy as np
import pytest

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.layers import PositionEmbedding
from vit_jax.models.vit import build_vit
from vit_jax.step import abstract_params

SMALL = ModelConfig(variant='mu/4', depth=2)

WRONG = {
  'an odd width for rows and columns': (
    {'width': 15, 'heads': 3, 'position': 'learned2d'},
    'width of 15',
  ),
  'sines at every layer': ({'position': 'sincos2d', 'position_at': 'every'}, 'not sincos2d'),
  'none at every layer': ({'position': 'none', 'position_at': 'shared'}, 'not none'),
  'relative at every layer': ({'position': 'relative', 'position_at': 'every'}, 'not relative'),
  'registers': ({'position_at': 'every', 'registers': 2}, 'registers=2 have no positions'),
  'a kernel of its own': ({'position': 'relative', 'attention': 'pallas'}, 'has no place'),
}


@pytest.mark.parametrize(('fields', 'words'), WRONG.values(), ids=WRONG)
def test_what_does_not_go_together_is_an_error(fields, words):
  with pytest.raises(UserError, match=words):
    build_vit(dataclasses.replace(SMALL, **fields), 3)


def test_a_table_of_rows_and_columns_has_their_vectors_and_nothing_for_the_class_token():
  tokens = np.zeros((1, 7, 4), np.float32)
  table, variables = PositionEmbedding('learned2d', (2, 3)).init_with_output(
    jax.random.key(0), tokens
  )
  columns, rows = variables['params']['column_embedding'], variables['params']['row_embedding']
  assert columns.shape == (3, 2) and rows.shape == (2, 2)
  np.testing.assert_array_equal(table[0, 0], 0)
  np.testing.assert_array_equal(table[0, 1 + 3 * 1 + 2], np.concatenate([columns[2], rows[1]]))


def test_each_block_has_its_own_table_or_all_share_one():
  shapes = lambda where: abstract_params(
    build_vit(dataclasses.replace(SMALL, position_at=where), 3), (8, 12)
  )['Transformer']
  own, one = shapes('every'), shapes('shared')
  assert own['encoderblock']['posembed_input']['pos_embedding'].shape == (2, 1, 7, 32)
  assert 'posembed_input' not in own and 'posembed_input' not in one['encoderblock']
  assert one['posembed_input']['pos_embedding'].shape == (1, 7, 32)


def test_attention_that_is_looked_at_knows_relative_positions():
  model = build_vit(dataclasses.replace(SMALL, position='relative', pool='gap'), 3)
  images = np.full(
    (1, 8, 12, 3), 100, np.uint8
  )  # One colour: without offsets every key is taken alike.
  params = model.init(jax.random.key(0), images)['params']
  _, seen = model.apply({'params': params}, images, mutable=['attention'])
  (weights,) = jax.tree.leaves(seen)
  assert weights.shape == (2, 1, 2, 6, 6) and np.std(weights) > 1e-4
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
