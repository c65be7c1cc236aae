"""Tests of the family of a variant, and of the settings that a family does not read."""

import functools

import jax
import numpy as np
import optax
import pytest

from vit_jax.config import ModelConfig, OptimConfig
from vit_jax.errors import UserError
from vit_jax.models.axial import AxialResNet, AxialVisionTransformer
from vit_jax.models.efficientnet import EfficientNet
from vit_jax.models.families import build_model, family_name
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import VisionTransformer
from vit_jax.optim.losses import softmax_loss
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import make_mesh, replicated, to_global
from vit_jax.step import abstract_params, init_state, train_step

NAMES = {
  'B/16': 'Vision Transformer', 'So400m/14': 'Vision Transformer',
  'R50+B/16': 'hybrid', 'R2.1+mu/8': 'hybrid',
  'R50x1': 'BiT ResNet', 'BiT-R152x4': 'BiT ResNet', 'R1.1x1': 'BiT ResNet',
  'AxialViT-B/16': 'Axial-ViT', 'AxialR50x1': 'Axial ResNet', 'AxialR1.1x2': 'Axial ResNet',
  'EfficientNet-B0': 'EfficientNet', 'EfficientNet-0.5x0.2': 'EfficientNet',
}  # fmt: skip

CLASSES = {
  'Vision Transformer': VisionTransformer, 'hybrid': VisionTransformer, 'BiT ResNet': ResNet,
  'EfficientNet': EfficientNet, 'Axial-ViT': AxialVisionTransformer, 'Axial ResNet': AxialResNet,
}  # fmt: skip


@pytest.mark.parametrize(('variant', 'name'), NAMES.items())
def test_a_variants_name_determines_its_family_and_class(variant, name):
  assert family_name(variant) == name
  pool = 'gap' if name == 'Axial-ViT' else 'token'
  assert isinstance(build_model(ModelConfig(variant=variant, pool=pool), 3), CLASSES[name])


@pytest.mark.parametrize(
  ('variant', 'fields', 'named'),
  [
    ('R50x1', {'heads': 4}, 'heads=4.*BiT ResNet'),
    ('BiT-R50x1', {'dropout': 0.1}, 'dropout=0.1.*BiT ResNet'),
    ('R50x1', {'remat': 'vit'}, "remat='vit'.*none, full"),
    ('B/16', {'stem_width': 32}, 'stem_width=32.*Vision Transformer'),
    ('EfficientNet-B8', {}, "variant='EfficientNet-B8'.*B0, B1,"),
    ('EfficientNet-B0', {'pool': 'gap'}, "pool='gap'.*an EfficientNet"),
    ('EfficientNet-B0', {'remat': 'dots'}, "remat='dots'.*none, full"),
    ('R50x', {}, "variant='R50x'"),
  ],
  ids=str,
)
def test_a_setting_that_the_family_does_not_read_is_an_error(variant, fields, named):
  with pytest.raises(UserError, match=f'config.model.{named}'):
    build_model(ModelConfig(variant=variant, **fields), 3)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['BiT-R1.1x1', 'AxialR1.1x1', 'EfficientNet-0.5x0.2'])
def test_eight_devices_equal_one(variant):
  """Two steps with axes 'data' and 'fsdp', and large parameters sharded."""
  model, lr = build_model(ModelConfig(variant=variant), 5), optax.constant_schedule(0.1)
  tx = make_optimizer(OptimConfig(name='sgd', lr=0.1), lr, abstract_params(model, (32, 32)))
  begin = functools.partial(init_state, 0, model=model, tx=tx, size=(32, 32), ema=False)
  step = functools.partial(train_step, model=model, tx=tx, loss=softmax_loss, lr=lr, seed=0)
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (16, 32, 32, 3), np.uint8),
    'label': rng.integers(0, 5, (16, 1), np.int32),
  }
  batch['mask'] = np.arange(16) != 3

  def run(fsdp, devices):
    mesh = make_mesh(fsdp, batches={}, devices=devices)
    shardings = state_shardings(jax.eval_shape(begin), mesh)
    state = jax.jit(begin, out_shardings=shardings)()
    update = jax.jit(
      functools.partial(step, mesh=mesh), out_shardings=(shardings, replicated(mesh))
    )
    for _ in range(2):
      state, metrics = update(state, to_global(batch, mesh))
    return state.params, float(metrics['loss'])

  one, loss = run(1, jax.devices()[:1])
  eight, same = run(4, jax.devices())
  assert same == pytest.approx(loss, rel=1e-5)
  assert any('fsdp' in leaf.sharding.spec for leaf in jax.tree.leaves(eight))
  difference = optax.tree.norm(optax.tree.sub(jax.device_get(one), jax.device_get(eight)))
  assert difference < 1e-4 * optax.tree.norm(one)
