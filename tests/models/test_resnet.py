"""BiT's ResNets against timm with the same random file, against the paper's Table 6, and as models of the house."""

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
def test_flops_are_those_of_table_6(variant, gflops):
  assert resnet_shape(variant).flops((224, 224)) / 1e9 == pytest.approx(gflops, rel=0.01)


@pytest.mark.parametrize('variant', ['R50x1', 'R1.2x2', 'BiT-R50x1'])
@pytest.mark.parametrize('size', [(224, 224), (70, 45)])
def test_flops_are_within_one_percent_of_what_xla_counts(variant, size):
  """Of the convolutions alone: the norms are another 1 to 2 %."""
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
  """Every equation, those inside others too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      if hasattr(value, 'jaxpr'):
        yield from equations(value.jaxpr)


def padded_products(x: tuple, kernel: tuple, strides: tuple, padding: tuple) -> int:
  """Multiply-adds of a convolution [1, h, w, c] with [p, q, c, d], none with padding, one tap at a time."""
  count = kernel[2] * kernel[3]
  for side, k, stride, (low, high) in zip(x[1:3], kernel[:2], strides, padding, strict=True):
    starts = range(-low, side + high - k + 1, stride)
    count *= sum(0 <= start + tap < side for start in starts for tap in range(k))
  return count


def test_taps_of_a_convolution_are_counted_without_padding():
  assert conv_taps((4, 4), 1, 1) == 16
  assert conv_taps((4, 4), 3, 1) == (2 + 3 + 3 + 2) ** 2
  assert conv_taps((4, 5), 3, 2) == (3 + 2) * (2 + 3 + 2)


@pytest.mark.parametrize(('variant', 'millions'), MILLIONS.items())
def test_published_networks_have_the_published_parameters(variant, millions):
  shapes = abstract_params(build_model(ModelConfig(variant=f'BiT-{variant}'), 1000), (224, 224))
  assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 2) == millions


def bit_file(path, variant: str, classes: int, *, numbered: bool = False) -> dict[str, np.ndarray]:
  """Writes a random .npz as the published are; our flat tree of it."""
  flat = draw(ModelConfig(variant=variant), classes, (64, 64))
  # Kernels of deviation 1, so that timm's 1e-8 beside their variance is as little as the original's 1e-10.
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


def relative_to_timm(build_theirs, path, variant: str) -> float:
  """The largest difference between our logits and those of timm's model, both of the file, relative to timm's largest.

  One after the other: the larger ones would not fit into memory together.
  """
  import torch

  images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
  ours = logits_of(path, variant, images)
  theirs = build_theirs().eval()
  theirs.load_pretrained(str(path))
  with torch.no_grad():
    expected = theirs(
      torch.tensor((images.transpose(0, 3, 1, 2) - np.float32(127.5)) / np.float32(127.5))
    ).numpy()
  return np.abs(ours - expected).max() / np.abs(expected).max()


def logits_of(path, variant: str, images: np.ndarray) -> np.ndarray:
  """What we make of the file, which holds such a model."""
  ours = vit_jax.load(str(path), size=64)
  assert ours.config.variant == variant
  return np.asarray(ours.logits(images))


def test_logits_equal_timms_of_the_same_file(timm, tmp_path):
  bit_file(tmp_path / 'bit.npz', 'BiT-R1.2x1', 10)
  conv = functools.partial(timm.layers.StdConv2d, eps=1e-8)
  fields = {
    'layers': [1, 2],
    'channels': (256, 512),
    'num_classes': 10,
    'stem_type': 'fixed',
    'conv_layer': conv,
  }
  build_theirs = functools.partial(timm.models.ResNetV2, **fields)
  assert relative_to_timm(build_theirs, tmp_path / 'bit.npz', 'BiT-R1.2x1') <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize('variant', MILLIONS)
def test_logits_of_every_published_size_equal_timms(timm, tmp_path, variant, monkeypatch):
  one = functools.partial(
    make_mesh, devices=jax.devices()[:1]
  )  # The largest would take 30 GB on eight.
  monkeypatch.setattr('vit_jax.pretrained.model.make_mesh', one)
  bit_file(tmp_path / 'bit.npz', f'BiT-{variant}', 10)
  name = f'resnetv2_{variant.removeprefix("R")}_bit'
  build_theirs = functools.partial(timm.create_model, name, pretrained=False, num_classes=10)
  assert relative_to_timm(build_theirs, tmp_path / 'bit.npz', f'BiT-{variant}') <= 2e-5


def test_a_file_with_numbered_convolutions_is_the_same(tmp_path):
  flat = bit_file(tmp_path / 'bit.npz', 'BiT-R1.2x1', 5, numbered=True)
  found = vit_jax.load(str(tmp_path / 'bit.npz'))
  assert (found.config.variant, found.classes, found.size) == ('BiT-R1.2x1', 5, (224, 224))
  read = flax.traverse_util.flatten_dict(found.params, sep='/')
  assert read.keys() == flat.keys()
  for name, array in flat.items():
    np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize('variant', ['BiT-R1.2x1', 'R2.1x1'])
def test_export_to_npz_is_read_again(tmp_path, variant):
  """`export_model` itself compares the logits."""
  from vit_jax.pretrained.export import export_model

  bit_file(tmp_path / 'bit.npz', variant, 5)
  export_model(vit_jax.load(str(tmp_path / 'bit.npz'), size=32), tmp_path / 'again.npz', 'npz')
  assert vit_jax.load(str(tmp_path / 'again.npz')).config.variant == variant


def test_what_a_resnet_does_not_have_is_an_error(tmp_path):
  bit_file(tmp_path / 'bit.npz', 'BiT-R1.1x1', 5)
  model = vit_jax.load(str(tmp_path / 'bit.npz'), size=32)
  images = np.zeros((1, 32, 32, 3), np.uint8)
  assert model.features(images).shape == (1, 512)
  for ask in (model.tokens, model.attention):
    with pytest.raises(UserError, match='is a BiT ResNet, which has no'):
      ask(images)


@pytest.mark.parametrize('variant', ['R1.1x1', 'BiT-R1.1x1'])
def test_a_model_computes_in_the_type_asked_for_and_gives_float32_logits(variant):
  model = build_model(ModelConfig(variant=variant, dtype='bfloat16', **SMALL), 7)
  images = jax.random.bits(jax.random.key(1), (2, 33, 20, 3), jnp.uint8)
  run = lambda params: model.apply({'params': params}, images, mutable=['features'])
  logits, sown = jax.eval_shape(run, abstract_params(model, (33, 20)))
  features = sown['features']['features'][0]
  assert (logits.dtype, logits.shape) == (jnp.float32, (2, 7))
  assert (features.dtype, features.shape) == (jnp.bfloat16, (2, 256))
  assert model.shape.width == 256
  assert math.prod(model.shape.grid((33, 20))) == 5 * 3


def test_remat_changes_no_gradient():
  images = jax.random.bits(jax.random.key(1), (2, 16, 16, 3), jnp.uint8)
  plain, again = (
    build_model(ModelConfig(variant='BiT-R1.1x1', remat=remat, **SMALL), 0)
    for remat in ('none', 'full')
  )
  params = jax.jit(plain.init)(jax.random.key(0), images)['params']
  loss = lambda model: lambda params: (model.apply({'params': params}, images) ** 2).sum()
  ours, theirs = (jax.jit(jax.grad(loss(model)))(params) for model in (plain, again))
  difference = optax.tree.norm(optax.tree.sub(ours, theirs)) / optax.tree.norm(ours)
  assert difference < 1e-5


def test_wrong_shapes_are_errors():
  with pytest.raises(UserError, match="there is no ResNet 'R51'. Did you mean 'R50'"):
    build_model(ModelConfig(variant='R51x1'), 3)
  with pytest.raises(UserError, match='stem_width=48: expected a multiple of the 32'):
    build_model(ModelConfig(variant='R50x1', stem_width=48), 3)
