"""AxialResNets against NumPy in double precision, a line and a pair of places at a time, and their cost against Figure 13."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_resnet import equations, padded_products
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.axial import AxialBottleneck, LineAttention
from vit_jax.models.families import build_model
from vit_jax.paper.published import read_published_table
from vit_jax.step import abstract_params

HEADS, GROUPS = 8, 32
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)  # Compiles in half the time.


def random_params(module, x, seed: int = 0) -> dict:
  """Every tensor drawn at random, zeros and ones included."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)['params']
  draw = lambda path, leaf: (0.5 * rng.normal(size=leaf.shape) + (path[-1].key == 'scale')).astype(
    np.float32
  )
  return jax.tree.map_with_path(draw, shapes)


def norm(x, p, eps):
  """GroupNorm of one image or line [..., c]: over all its places and the channels of a group."""
  out = np.empty_like(x)
  for group in np.split(np.arange(x.shape[-1]), GROUPS):
    part = x[..., group]
    out[..., group] = (part - part.mean()) / np.sqrt(part.var() + eps)
  return out * p['scale'] + p['bias']


def along(line, p):
  """The attention of one line [n, c], one head and one pair of places after the other."""
  n, c = line.shape
  wide, out = c // HEADS, np.zeros((n, c))
  qkv = norm(line @ p['qkv']['kernel'], p['gn_qkv'], 1e-4)
  for head in range(HEADS):
    q, k, v = np.split(qkv[:, 2 * wide * head : 2 * wide * (head + 1)], [wide // 2, wide], axis=1)
    for i in range(n):
      r_q, r_k, r_v = np.split(
        p['relative'][[i - j + n - 1 for j in range(n)]], [wide // 2, wide], axis=1
      )
      scores = np.array([q[i] @ k[j] + q[i] @ r_k[j] + k[j] @ r_q[j] for j in range(n)])
      weights = np.exp(scores - scores.max())
      out[i, wide * head : wide * (head + 1)] = weights / weights.sum() @ (v + r_v)
  return norm(out, p['gn_out'], 1e-4)


def standardised(kernel):
  """A 1x1 kernel [1, 1, c, d] as a matrix."""
  matrix = kernel[0, 0]
  return (matrix - matrix.mean(axis=0)) / (matrix.std(axis=0) + 1e-5)


def halved(x):
  """The mean of each 2x2 places, and at an odd edge of those that are there."""
  (h, w), top, left = x.shape[:2], range(0, x.shape[0], 2), range(0, x.shape[1], 2)
  return np.array(
    [[x[i : min(i + 2, h), j : min(j + 2, w)].mean(axis=(0, 1)) for j in left] for i in top]
  )


def unit(x, p, stride):
  """A bottleneck of one image [h, w, c]."""
  relu = lambda x: np.maximum(x, 0)
  shortcut = norm(
    x[::stride, ::stride] @ standardised(p['conv_proj']['kernel']), p['gn_proj'], 1e-6
  )
  x = relu(norm(x @ standardised(p['conv1']['kernel']), p['gn1'], 1e-6))
  x = np.stack([along(row, p['row']) for row in x])
  x = np.stack([along(column, p['column']) for column in x.swapaxes(0, 1)], axis=1)
  x = relu(halved(x) if stride == 2 else x)
  return relu(shortcut + norm(x @ standardised(p['conv3']['kernel']), p['gn3'], 1e-6))


@pytest.mark.parametrize(('stride', 'size'), [(1, (3, 5)), (2, (4, 3))])
def test_a_unit_is_what_numpy_makes_of_lines_one_at_a_time(stride, size):
  x = np.random.default_rng(1).normal(size=(2, *size, 32)).astype(np.float32)
  module = AxialBottleneck(32, stride, jnp.float32)
  params = random_params(module, x)
  ours = jit(module.apply)({'params': params}, x)
  exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  expected = np.stack([unit(image.astype(np.float64), exact, stride) for image in x])
  assert expected.shape == ours.shape == (2, *(-(-side // stride) for side in size), 128)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


def test_a_line_knows_nothing_of_other_lines():
  x = np.random.default_rng(2).normal(size=(1, 3, 4, 32)).astype(np.float32)
  module = LineAttention(jnp.float32)
  params = random_params(module, x)
  other = x.copy()
  other[0, 1, 2, 0] += 1
  apply = jit(module.apply)
  changed = (apply({'params': params}, x) != apply({'params': params}, other)).any(axis=(0, 3))
  assert np.array_equal(changed, np.outer([0, 1, 0], np.ones(4)))


def counted(variant: str, size: tuple[int, int]) -> tuple[float, float]:
  """FLOPs of (convolutions and products, all that XLA counts) in the program, of an image."""
  model = build_model(ModelConfig(variant=variant), 0)
  run = lambda params, image: model.apply({'params': params}, image)
  arguments = abstract_params(model, size), jax.ShapeDtypeStruct((1, *size, 3), np.uint8)
  products = 0
  for eqn in equations(jax.make_jaxpr(run)(*arguments).jaxpr):
    shapes = [v.aval.shape for v in eqn.invars]
    if eqn.primitive.name == 'conv_general_dilated':
      products += padded_products(*shapes, eqn.params['window_strides'], eqn.params['padding'])
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      products += int(
        np.prod(eqn.outvars[0].aval.shape) * np.prod([shapes[0][axis] for axis in contracted])
      )
  return 2 * products, jax.jit(run).lower(*arguments).cost_analysis()['flops']


@pytest.mark.parametrize('size', [(224, 224), (70, 45)])
def test_flops_are_those_of_the_products_in_the_program(size):
  ours = build_model(ModelConfig(variant='AxialR1.1x1'), 0).shape.flops(size)
  assert ours == pytest.approx(counted('AxialR1.1x1', size)[0], rel=1e-6)


def test_the_cost_beside_a_resnet_is_six_per_cent_below_figure_13s():
  """Figure 13: 55.6 / 51.0 exaFLOPs = 1.090. Ours is 1.026, and 1.033 with the norms and softmax that XLA counts too."""
  theirs = {
    row['model']: float(row['x'])
    for row in read_published_table('fig13')
    if row['axis'] == 'exaFLOPs'
  }
  flops, everything = zip(
    *(counted(variant, (224, 224)) for variant in ('AxialR50x1', 'R50x1')), strict=True
  )
  ratio = lambda pair: pair[0] / pair[1] / (theirs['AxialResNet50'] / theirs['ResNet50'])
  assert (ratio(flops), ratio(everything)) == (
    pytest.approx(0.941, abs=2e-3),
    pytest.approx(0.948, abs=2e-3),
  )
  assert flops[0] == pytest.approx(everything[0], rel=0.04)
  assert flops[0] == pytest.approx(
    build_model(ModelConfig(variant='AxialR50x1'), 0).shape.flops((224, 224)), rel=1e-6
  )


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_gradients_are_finite_and_reach_every_parameter(remat):
  model = build_model(ModelConfig(variant='AxialR1.1x1', stem_width=32, remat=remat), 3)
  images = np.random.default_rng(3).integers(0, 256, (2, 20, 12, 3), np.uint8)
  params = random_params(model, images)
  loss = lambda params: jnp.sum(model.apply({'params': params}, images, train=True)[:, 0])
  for path, leaf in jax.tree.leaves_with_path(jit(jax.grad(loss))(params)):
    assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)


def test_it_computes_in_bfloat16_and_gives_float32_logits():
  model = build_model(ModelConfig(variant='AxialR1.1x1', stem_width=32, dtype='bfloat16'), 3)
  images = jax.ShapeDtypeStruct((2, 20, 12, 3), np.uint8)
  run = functools.partial(model.apply, mutable=['features'])
  logits, sown = jax.eval_shape(run, {'params': abstract_params(model, (20, 12))}, images)
  assert (logits.dtype, logits.shape) == (jnp.float32, (2, 3))
  assert sown['features']['features'][0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('variant', 'fields', 'message'),
  [
    (
      'AxialR51x1',
      {},
      "config.model.variant='AxialR51x1': there is no ResNet 'R51'. Did you mean 'R50'",
    ),
    ('AxialR50x1', {'stem_width': 48}, 'stem_width=48: expected a multiple of the 32'),
    (
      'AxialR50x1',
      {'pool': 'gap'},
      "config.model.pool='gap': AxialR50x1 is an Axial ResNet, which has no such setting",
    ),
    (
      'AxialR50x1',
      {'remat': 'vit'},
      "config.model.remat='vit': AxialR50x1 is an Axial ResNet, which knows none, full",
    ),
    ('AxialBiT-R50x1', {}, "there is no variant 'AxialBiT-R50x1'"),
  ],
)
def test_what_an_axial_resnet_does_not_have_is_an_error(variant, fields, message):
  with pytest.raises(UserError) as error:
    build_model(ModelConfig(variant=variant, **fields), 3)
  assert message in str(error.value)
