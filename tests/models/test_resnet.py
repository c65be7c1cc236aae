"""Tests of BiT's ResNets against timm with the same random file, and against published numbers.

The FLOPs are those of arXiv 2010.11929, Table 6.
"""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vit_jax
from tests.pretrained.released_layout import draw
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.families import build_model
from vit_jax.models.variants import conv_taps, resnet_shape
from vit_jax.pretrained.npz import to_bit
from vit_jax.sharding.mesh import make_mesh
from vit_jax.step import abstract_params

SMALL = {'stem_width': 32}
# arXiv 2010.11929, Table 6: exaFLOPs / (3 passes x 303 million images x epochs), in 10^9.
TABLE_6 = {
  'R50x1': 7.9,
  'R50x2': 31.3,
  'R101x1': 15.1,
  'R152x1': 22.2,
  'R152x2': 88.5,
  'R200x3': 259.8,
}
# Millions of parameters with 1,000 classes: timm's results-imagenet.csv.
MILLIONS = {
  'R50x1': 25.55,
  'R101x1': 44.54,
  'R152x2': 236.34,
  'R50x3': 217.32,
  'R101x3': 387.93,
  'R152x4': 936.53,
}


@pytest.mark.parametrize(('variant', 'gflops'), TABLE_6.items())
def test_flops_equal_those_of_table_6(variant, gflops):
  assert resnet_shape(variant).flops((224, 224)) / 1e9 == pytest.approx(gflops, rel=0.01)


@pytest.mark.parametrize('variant', ['R50x1', 'R1.2x2', 'BiT-R50x1'])
@pytest.mark.parametrize('size', [(224, 224), (70, 45)])
def test_flops_are_within_one_percent_of_what_xla_counts(variant, size):
  """The convolutions alone; XLA counts another 1 to 2 % for the norms."""
  model = build_model(ModelConfig(variant=variant), 0)
  params = abstract_params(model, size)
  convolutions = []
  jaxpr = jax.make_jaxpr(lambda params, images: model.apply({'params': params}, images))(
    params, jax.ShapeDtypeStruct((1, *size, 3), np.uint8)
  )
  for eqn in equations(jaxpr.jaxpr):
    if eqn.primitive.name == 'conv_general_dilated':
      x, kernel = (v.aval.shape for v in eqn.invars)
      convolutions.append(
        padded_products(x, kernel, eqn.params['window_strides'], eqn.params['padding'])
      )
  assert model.shape.flops(size) == pytest.approx(2 * sum(convolutions), rel=0.01)


def equations(jaxpr):
  """Yield every equation, including those nested in others."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      if hasattr(value, 'jaxpr'):
        yield from equations(value.jaxpr)


def padded_products(x: tuple, kernel: tuple, strides: tuple, padding: tuple) -> int:
  """Return the multiply-adds of a convolution without those on padding, counted tap by tap.

  The image is [1, h, w, c] and the kernel [p, q, c, d].
  """
  count = kernel[2] * kernel[3]
  for side, k, stride, (low, high) in zip(x[1:3], kernel[:2], strides, padding, strict=True):
    starts = range(-low, side + high - k + 1, stride)
    count *= sum(0 <= start + tap < side for start in starts for tap in range(k))
  return count


def test_conv_taps_excludes_padding():
  assert conv_taps((4, 4), 1, 1) == 16
  assert conv_taps((4, 4), 3, 1) == (2 + 3 + 3 + 2) ** 2
  assert conv_taps((4, 5), 3, 2) == (3 + 2) * (2 + 3 + 2)


@pytest.mark.parametrize(('variant', 'millions'), MILLIONS.items())
def test_networks_have_the_published_number_of_parameters(variant, millions):
  shapes = abstract_params(build_model(ModelConfig(variant=f'BiT-{variant}'), 1000), (224, 224))
  assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 2) == millions


def bit_file(
  path, variant: str, classes: int, *, numbered: bool = False, **fields
) -> dict[str, np.ndarray]:
  """Write a random .npz in the layout of the published files; return it as our flat tree."""
  flat = draw(ModelConfig(variant=variant, **fields), classes, (64, 64))
  # With kernels of deviation 1, timm's epsilon of 1e-8 matters as little as the original's 1e-10.
  flat = {
    name: array / array.std() if name.endswith('kernel') and 'head' not in name else array
    for name, array in flat.items()
  }
  theirs = to_bit(flat)
  if numbered:
    theirs = {
      name.replace('standardized_conv2d', f'standardized_conv2d_{i}'): array
      for i, (name, array) in enumerate(theirs.items())
    }
  np.savez(path, **theirs)
  return flat


def relative_to_timm(build_theirs, path, variant: str, channels: int = 3) -> float:
  """Return the largest difference between our logits and timm's, relative to timm's largest.

  The models run one after the other, because two large ones do not fit into memory together.
  """
  import torch

  images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, channels), np.uint8)
  ours = logits_of(path, variant, images)
  theirs = build_theirs().eval()
  theirs.load_pretrained(str(path))
  with torch.no_grad():
    pixels = (images.transpose(0, 3, 1, 2) - np.float32(127.5)) / np.float32(127.5)
    expected = theirs(torch.tensor(pixels)).numpy()
  return np.abs(ours - expected).max() / np.abs(expected).max()


def logits_of(path, variant: str, images: np.ndarray) -> np.ndarray:
  """Load a file that must hold `variant`, and return its logits."""
  model = vit_jax.load(str(path), size=64)
  assert model.config.variant == variant
  return np.asarray(model.logits(images))


@pytest.mark.parametrize('channels', [3, 1])
def test_logits_equal_timms_with_the_same_file(timm, tmp_path, channels):
  values = (127.5,) * channels
  bit_file(tmp_path / 'bit.npz', 'BiT-R1.2x1', 10, channels=channels, mean=values, scale=values)
  conv = functools.partial(timm.layers.StdConv2d, eps=1e-8)
  fields = {
    'layers': [1, 2],
    'channels': (256, 512),
    'num_classes': 10,
    'in_chans': channels,
    'stem_type': 'fixed',
    'conv_layer': conv,
  }
  build_theirs = functools.partial(timm.models.ResNetV2, **fields)
  assert relative_to_timm(build_theirs, tmp_path / 'bit.npz', 'BiT-R1.2x1', channels) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize('variant', MILLIONS)
def test_logits_of_every_published_size_equal_timms(timm, tmp_path, variant, monkeypatch):
  # On eight devices, the largest model would take 30 GB.
  one = functools.partial(make_mesh, devices=jax.devices()[:1])
  monkeypatch.setattr('vit_jax.pretrained.model.make_mesh', one)
  bit_file(tmp_path / 'bit.npz', f'BiT-{variant}', 10)
  name = f'resnetv2_{variant.removeprefix("R")}_bit'
  build_theirs = functools.partial(timm.create_model, name, pretrained=False, num_classes=10)
  assert relative_to_timm(build_theirs, tmp_path / 'bit.npz', f'BiT-{variant}') <= 2e-5


def test_a_file_with_numbered_convolutions_loads_the_same_arrays(tmp_path):
  flat = bit_file(tmp_path / 'bit.npz', 'BiT-R1.2x1', 5, numbered=True)
  model = vit_jax.load(str(tmp_path / 'bit.npz'))
  assert (model.config.variant, model.classes, model.size) == ('BiT-R1.2x1', 5, (224, 224))
  loaded = flax.traverse_util.flatten_dict(model.params, sep='/')
  assert loaded.keys() == flat.keys()
  for name, array in flat.items():
    np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize('variant', ['BiT-R1.2x1', 'R2.1x1'])
def test_an_exported_npz_loads_as_the_same_variant(tmp_path, variant):
  """`export_model` compares the logits."""
  from vit_jax.pretrained.export import export_model

  bit_file(tmp_path / 'bit.npz', variant, 5)
  export_model(vit_jax.load(str(tmp_path / 'bit.npz'), size=32), tmp_path / 'exported.npz', 'npz')
  assert vit_jax.load(str(tmp_path / 'exported.npz')).config.variant == variant


def test_tokens_and_attention_of_a_resnet_are_errors(tmp_path):
  bit_file(tmp_path / 'bit.npz', 'BiT-R1.1x1', 5)
  model = vit_jax.load(str(tmp_path / 'bit.npz'), size=32)
  images = np.zeros((1, 32, 32, 3), np.uint8)
  assert model.features(images).shape == (1, 512)
  for method in (model.tokens, model.attention):
    with pytest.raises(UserError, match='BiT ResNet'):
      method(images)


@pytest.mark.parametrize('variant', ['R1.1x1', 'BiT-R1.1x1'])
def test_a_model_computes_in_bfloat16_and_returns_float32_logits(variant):
  model = build_model(ModelConfig(variant=variant, dtype='bfloat16', **SMALL), 7)
  images = jax.random.bits(jax.random.key(1), (2, 33, 20, 3), jnp.uint8)
  run = lambda params: model.apply({'params': params}, images, mutable=['features'])
  logits, sown = jax.eval_shape(run, abstract_params(model, (33, 20)))
  features = sown['features']['features'][0]
  assert (logits.dtype, logits.shape) == (jnp.float32, (2, 7))
  assert (features.dtype, features.shape) == (jnp.bfloat16, (2, 256))
  assert model.shape.width == 256
  assert math.prod(model.shape.grid((33, 20))) == 5 * 3


def test_remat_does_not_change_gradients():
  images = jax.random.bits(jax.random.key(1), (2, 16, 16, 3), jnp.uint8)
  plain, rematerialized = (
    build_model(ModelConfig(variant='BiT-R1.1x1', remat=remat, **SMALL), 0)
    for remat in ('none', 'full')
  )
  params = jax.jit(plain.init)(jax.random.key(0), images)['params']
  loss = lambda model: lambda params: (model.apply({'params': params}, images) ** 2).sum()
  expected, actual = (jax.jit(jax.grad(loss(model)))(params) for model in (plain, rematerialized))
  difference = optax.tree.norm(optax.tree.sub(actual, expected))
  assert difference < 1e-5 * optax.tree.norm(expected)


def test_an_unknown_depth_and_a_width_that_norm_groups_do_not_divide_are_errors():
  with pytest.raises(UserError, match="variant='R51x1'.*Did you mean 'R50'"):
    build_model(ModelConfig(variant='R51x1'), 3)
  with pytest.raises(UserError, match='stem_width=48'):
    build_model(ModelConfig(variant='R50x1', stem_width=48), 3)
