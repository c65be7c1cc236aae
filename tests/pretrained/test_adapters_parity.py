"""Training of adapters against PyTorch: transformers' model, and torch's own autograd and AdamW."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.pretrained.released_layout import google_file
from vit_jax import load
from vit_jax.config import Config, DataConfig, LoraConfig, ModelConfig, OptimConfig
from vit_jax.models.lora import is_adapter
from vit_jax.optim.losses import softmax_loss
from vit_jax.pretrained.export import export_model
from vit_jax.step import TrainState, train_step
from vit_jax.training.program import make_program
from vit_jax.training.task import make_task

MODEL = ModelConfig(variant='mu/8', depth=2, heads=4, norm_eps=1e-12, gelu='erf')
SIZE, CLASSES, STEPS = (32, 32), 5, 4
LORA = LoraConfig(rank=3, alpha=6.0)
OPTIM = OptimConfig(name='adamw', lr=3e-3, schedule='constant', b2=0.99, weight_decay=0.0)
RNG = np.random.default_rng(0)
BATCHES = [
  (RNG.integers(0, 256, (6, *SIZE, 3), np.uint8), RNG.integers(0, CLASSES, 6)) for _ in range(STEPS)
]


@pytest.fixture
def program(tmp_path):
  config = Config(
    data=DataConfig(train='builtin:digits', batch=6, size=SIZE),
    model=MODEL, lora=LORA, optim=OPTIM, init='base', init_head='keep', steps=STEPS,
  )  # fmt: skip
  return make_program(
    *(config, make_task(config)),
    examples=60, classes=CLASSES, label_slots=1, devices=jax.devices()[:1],
  )  # fmt: skip


def draw_params(base: dict, program) -> dict:
  """Return the base with random adapters, B included."""
  rng, flat = np.random.default_rng(1), flatten_dict(base, sep='/')
  for path, leaf in flatten_dict(program.param_shapes, sep='/').items():
    if is_adapter(path):
      flat[path] = 0.2 * rng.standard_normal(leaf.shape, np.float32)
  return unflatten_dict(flat, sep='/')


def train_ours(program, params: dict) -> tuple[list[float], dict]:
  tx = program.tx
  state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), ema=None)
  step = functools.partial(
    *(train_step,), model=program.model, tx=tx, loss=softmax_loss,
    lr=optax.constant_schedule(OPTIM.lr), seed=0, is_trained=program.is_trained,
  )  # fmt: skip
  step, losses = jax.jit(step), []
  for images, labels in BATCHES:
    batch = {'image': images, 'label': labels[:, None].astype(np.int32), 'mask': np.ones(6, bool)}
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  return losses, flatten_dict(state.params, sep='/')


def train_torch(model, params: dict) -> tuple[list[float], dict]:
  """Train the adapters of transformers' model in float64; return the losses and its adapters."""
  import torch

  class Adapter(torch.nn.Module):
    def __init__(self, a, b):
      super().__init__()
      self.a, self.b = (
        torch.nn.Parameter(torch.tensor(x, dtype=torch.float64).flatten(1)) for x in (a, b)
      )

    def forward(self, weight):
      return weight + LORA.alpha / LORA.rank * (self.a @ self.b).T

  model.double().eval().requires_grad_(False)
  flat, adapters = flatten_dict(params, sep='/'), {}
  for name in ('query', 'value'):
    prefix = f'Transformer/encoderblock/MultiHeadDotProductAttention_1/{name}'
    layers = [
      m for path, m in model.named_modules() if path.split('.')[-1] in (name, f'{name[0]}_proj')
    ]
    assert len(layers) == MODEL.depth
    for i, layer in enumerate(layers):
      adapter = Adapter(*(flat[f'{prefix}/{part}'][i] for part in ('lora_a', 'lora_b')))
      torch.nn.utils.parametrize.register_parametrization(layer, 'weight', adapter)
      adapters[name, i] = adapter
  trained = [p for adapter in adapters.values() for p in adapter.parameters()]
  trained += list(model.classifier.requires_grad_(True).parameters())
  optimizer = torch.optim.AdamW(trained, OPTIM.lr, betas=(OPTIM.b1, OPTIM.b2), weight_decay=0.0)
  losses = []
  for images, labels in BATCHES:
    pixels = torch.tensor(images.transpose(0, 3, 1, 2) / 127.5 - 1)
    loss = torch.nn.functional.cross_entropy(model(pixels).logits, torch.tensor(labels))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
  return losses, adapters


def test_adapters_and_head_follow_torchs_trajectory(program, timm, tmp_path):
  del timm  # Lets torchvision be imported, which transformers does.
  transformers = pytest.importorskip('transformers')
  google_file(tmp_path / 'base.npz', MODEL, classes=CLASSES, size=SIZE)
  base = load(str(tmp_path / 'base.npz'), gelu='erf', norm_eps=1e-12)
  export_model(base, tmp_path / 'base', 'huggingface')
  model = transformers.ViTForImageClassification.from_pretrained(tmp_path / 'base')
  params = draw_params(base.params, program)
  losses, ours = train_ours(program, params)
  expected, adapters = train_torch(model, params)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  for (name, i), adapter in adapters.items():
    prefix = f'Transformer/encoderblock/MultiHeadDotProductAttention_1/{name}'
    for part, tensor in (('lora_a', adapter.a), ('lora_b', adapter.b)):
      found, before = (
        np.asarray(flat[f'{prefix}/{part}'])[i].reshape(tensor.shape)
        for flat in (ours, flatten_dict(params, sep='/'))
      )
      np.testing.assert_allclose(found, tensor.detach().numpy(), rtol=0, atol=2e-4)
      assert np.abs(found - before).max() > 5e-3  # Four steps of AdamW.
