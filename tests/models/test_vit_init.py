"""Tests of the initial distribution of every parameter, with the Kolmogorov-Smirnov test."""

import re

import jax
import numpy as np
import optax
import pytest
import scipy.stats
from flax.traverse_util import flatten_dict

from vit_jax.config import ModelConfig
from vit_jax.models.vit import build_vit
from vit_jax.step import init_state

uniform = lambda bound: scipy.stats.uniform(-bound, 2 * bound)
xavier = lambda fan_in, fan_out: uniform(np.sqrt(6 / (fan_in + fan_out)))
# LeCun's normal is truncated at two standard deviations, then scaled to the variance 1 / fan_in.
lecun = lambda fan_in: scipy.stats.truncnorm(
  -2, 2, scale=1 / np.sqrt(fan_in) / scipy.stats.truncnorm(-2, 2).std()
)

D, M, PATCH = 64, 96, 8 * 4 * 3
INITIAL = {
  r'.*/(query|key|value|out)/kernel': xavier(D, D),  # As [d, d], for any number of heads.
  r'.*/Dense_0/kernel': xavier(D, M),
  r'.*/Dense_1/kernel': xavier(M, D),
  r'.*/Dense_[01]/bias': scipy.stats.norm(scale=1e-6),
  r'embedding/kernel': lecun(PATCH),
  r'pre_logits/kernel': lecun(D),
  r'Transformer/posembed_input/pos_embedding': scipy.stats.norm(scale=0.02),
  r'registers': scipy.stats.norm(scale=0.02),
  r'MAPHead_0/probe': xavier(1, D),
  r'.*(norm|Norm).*/scale': 1,
  r'.*((norm|Norm)\w*|query|key|value|out|embedding|pre_logits)/bias': 0,
  r'cls|head/kernel': 0,
  r'head/bias': -10,
}


@pytest.fixture(scope='module', params=['token', 'map'])
def initial(request):
  """Return the initial parameters of a model by path."""
  fields = {
    'width': D, 'mlp': M, 'depth': 3, 'heads': 4, 'registers': 8, 'patch_norm': True,
    'hidden_head': True,
  }  # fmt: skip
  model = build_vit(ModelConfig(variant='mu/8x4', pool=request.param, head_bias=-10.0, **fields), 5)
  init = lambda: init_state(3, model=model, tx=optax.identity(), size=(64, 64), ema=False)
  # Compiles in half the time.
  state = jax.jit(init, compiler_options={'xla_backend_optimization_level': 0})()
  return flatten_dict(jax.device_get(state.params), sep='/')


def test_every_parameter_is_initialized_from_the_papers_distribution(initial):
  for path, array in initial.items():
    (expected,) = (row for pattern, row in INITIAL.items() if re.fullmatch(pattern, path))
    if isinstance(expected, int):
      np.testing.assert_array_equal(array, np.full(array.shape, expected, np.float32), err_msg=path)
      continue
    assert scipy.stats.kstest(array.ravel(), expected.cdf).pvalue > 1e-3, path
    assert array.std() == pytest.approx(expected.std(), rel=5 / np.sqrt(array.size)), path
    assert np.abs(array).max() <= expected.support()[1] * (1 + 1e-6), path


def test_no_two_blocks_or_parameters_are_initialized_alike(initial):
  drawn = {path: array for path, array in initial.items() if array.std() > 0}
  rows = [
    row.ravel()
    for path, array in drawn.items()
    for row in (array if '/encoderblock/' in path else [array])
  ]
  assert len(rows) == sum(3 if '/encoderblock/' in path else 1 for path in drawn)
  starts = [tuple(row[:8] / row.std()) for row in rows]
  assert len(set(starts)) == len(starts)
