"""Tests of position embeddings: their parameters, and settings that conflict.

Their numbers are in test_vit.py.
"""

import dataclasses

import jax
import numpy as np
import pytest

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.positions import PositionEmbedding
from vit_jax.models.vit import build_vit
from vit_jax.step import abstract_params

SMALL_VIT = ModelConfig(variant='mu/4', depth=2)


@pytest.mark.parametrize(
  ('fields', 'setting'),
  [
    ({'width': 15, 'heads': 3, 'position': 'learned2d'}, 'position'),
    ({'width': 10, 'heads': 2, 'position': 'sincos2d'}, 'position'),
    ({'position': 'sincos2d', 'position_at': 'every'}, 'position_at'),
    ({'position': 'none', 'position_at': 'shared'}, 'position_at'),
    ({'position': 'relative', 'position_at': 'every'}, 'position_at'),
    ({'position_at': 'every', 'registers': 2}, 'registers'),
    ({'position': 'relative', 'attention': 'pallas'}, 'attention'),
  ],
  ids=str,
)
def test_position_settings_that_conflict_are_errors(fields, setting):
  with pytest.raises(UserError, match=f'config.model.{setting}='):
    build_vit(dataclasses.replace(SMALL_VIT, **fields), 3)


def test_learned2d_concatenates_column_and_row_vectors_and_gives_the_class_token_zeros():
  tokens = np.zeros((1, 7, 4), np.float32)
  embedding = PositionEmbedding('learned2d', (2, 3))
  table, variables = embedding.init_with_output(jax.random.key(0), tokens)
  columns, rows = variables['params']['column_embedding'], variables['params']['row_embedding']
  assert columns.shape == (3, 2) and rows.shape == (2, 2)
  np.testing.assert_array_equal(table[0, 0], 0)
  np.testing.assert_array_equal(table[0, 1 + 3 * 1 + 2], np.concatenate([columns[2], rows[1]]))


def test_position_embeddings_are_per_block_at_every_and_single_at_shared():
  def shapes(position_at: str) -> dict:
    model = build_vit(dataclasses.replace(SMALL_VIT, position_at=position_at), 3)
    return abstract_params(model, (8, 12))['Transformer']

  every, shared = shapes('every'), shapes('shared')
  assert every['encoderblock']['posembed_input']['pos_embedding'].shape == (2, 1, 7, 32)
  assert 'posembed_input' not in every and 'posembed_input' not in shared['encoderblock']
  assert shared['posembed_input']['pos_embedding'].shape == (1, 7, 32)


@pytest.mark.parametrize('position', ['relative', 'relative2d'])
def test_sown_attention_weights_include_the_relative_position_bias(position):
  model = build_vit(dataclasses.replace(SMALL_VIT, position=position, pool='gap'), 3)
  # With a single color and no bias, every key would get the same weight.
  images = np.full((1, 8, 12, 3), 100, np.uint8)
  params = model.init(jax.random.key(0), images)['params']
  params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(0).normal(size=x.shape), params)
  _, sown = model.apply({'params': params}, images, mutable=['attention'])
  (weights,) = jax.tree.leaves(sown)
  assert weights.shape == (2, 1, 2, 6, 6) and np.std(weights) > 1e-4
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
