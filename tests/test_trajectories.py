"""A hundred steps in float32 equal those of an independent trainer.

The other trainer is timm's model with the optimizers of PyTorch and timm. Its schedule, clipping,
weight decay, layer decay, moving average and SAM are written here in plain PyTorch. Both start from
the same parameters and see the same mixed images and targets. The table of
docs/guides/optimizers.md has the differences that were measured last:

    python -m pytest -m parity tests/test_trajectories.py -s | python -m tests.test_trajectories
"""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.config import Config, DataConfig, DistillConfig, ModelConfig, OptimConfig
from vit_jax.optim.losses import add_teacher
from vit_jax.optim.sharpness import make_sharpness
from vit_jax.step import TrainState, predict_logits, train_step
from vit_jax.training.program import make_program
from vit_jax.training.task import make_task

pytestmark = pytest.mark.parity
FIGURES = Path(__file__).with_name('trajectory_figures.json')
GUIDE = Path(__file__).parents[1] / 'docs' / 'guides' / 'optimizers.md'
STEPS, BATCH, SIZE, CLASSES, DEPTH, WIDTH, HEADS = 100, 16, 32, 5, 3, 32, 4
TEACHER_SEED = 2  # Of the parameters of the teacher of distillation.
TOLERANCE = 1e-4  # Of the losses, relative, at every step.
MODEL = ModelConfig(
  variant='mu/8', width=WIDTH, depth=DEPTH, heads=HEADS, mlp=64, gelu='erf', layer_scale=0.3,
)  # fmt: skip
COMMON = {
  'schedule': 'cosine', 'warmup': '10', 'weight_decay_mask': '.*/kernel', 'grad_clip_norm': 1.0,
  'layer_decay': 0.8, 'ema': 0.95,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Settings of the optimizer, and of the loss or the teacher."""

  against: str
  optim: dict
  loss: dict = dataclasses.field(default_factory=dict)


ADAMW = {'name': 'adamw', 'lr': 1e-3, 'lr_end': 1e-5, 'weight_decay': 0.1}
SGD = {
  'name': 'sgd',
  'lr': 0.03,
  'lr_end': 1e-3,
  'weight_decay': 0.01,
  'coupled_weight_decay': True,
}
RECIPES = {
  'SGD with momentum': Recipe(
    '`torch.optim.SGD`',
    SGD,
  ),
  'AdamW': Recipe('`torch.optim.AdamW`', ADAMW),
  'LAMB': Recipe('`timm.optim.Lamb`', ADAMW | {'name': 'lamb', 'lr': 3e-3}),
  'Lion': Recipe('`timm.optim.Lion`', ADAMW | {'name': 'lion', 'lr': 1e-4, 'b2': 0.99}),
  'Muon': Recipe('`torch.optim.Muon` and `AdamW`', ADAMW | {'name': 'muon'}),
  'SAM with SGD': Recipe(
    'two passes in PyTorch',
    SGD | {'sam_rho': 0.1},
  ),
  'GSAM with AdamW': Recipe(
    'two passes in PyTorch', ADAMW | {'sam_rho': 0.3, 'sam_rho_min': 0.05, 'gsam_alpha': 0.6}
  ),
  'LAMB, binary cross-entropy': Recipe(
    '`timm.optim.Lamb`, `BCEWithLogitsLoss`',
    ADAMW | {'name': 'lamb', 'lr': 3e-3},
    {'loss': 'sigmoid', 'sigmoid_reduction': 'mean', 'target_threshold': 0.2},
  ),
  'distillation with AdamW': Recipe(
    '`torch.optim.AdamW`, `kl_div`',
    ADAMW,
    {'distill': DistillConfig(teacher='drawn', temperature=3.0, weight=0.8)},
  ),
}  # fmt: skip


def draw_params(shapes: dict, seed: int = 0) -> dict[str, np.ndarray]:
  """Return {path: array} of random parameters, none of which is zero."""
  rng, flat = np.random.default_rng(seed), {}
  for path, leaf in flatten_dict(shapes, sep='/').items():
    x = rng.standard_normal(leaf.shape, np.float32)
    name = path.rpartition('/')[2]
    if name == 'kernel':
      inputs = leaf.size // leaf.shape[-1] // (DEPTH if 'encoderblock' in path else 1)
      inputs = WIDTH if path.split('/')[-2] in ('query', 'key', 'value') else inputs
      flat[path] = x / np.float32(math.sqrt(inputs))
    elif name in ('scale', 'attention_scale', 'mlp_scale'):
      flat[path] = (1 if name == 'scale' else 0.3) * (1 + 0.1 * x)
    else:
      flat[path] = 0.05 * x
  return flat


def draw_batches() -> list[tuple[np.ndarray, np.ndarray]]:
  """Return mixed images, float32 [b, h, w, 3], and their targets [b, k] for each step."""
  rng, batches = np.random.default_rng(1), []
  patterns = rng.integers(0, 256, (CLASSES, SIZE, SIZE, 3))
  for _ in range(STEPS):
    labels = rng.integers(0, CLASSES, BATCH)
    images = (patterns[labels] + rng.integers(0, 256, (BATCH, SIZE, SIZE, 3))) / 2
    part, targets = np.float32(rng.beta(0.8, 0.8)), np.eye(CLASSES, dtype=np.float32)[labels]
    mix = lambda x, part=part: part * x + (1 - part) * x[::-1]
    batches.append((mix(images.astype(np.float32)), mix(targets)))
  return batches


def make_config(recipe: Recipe) -> Config:
  return Config(
    data=DataConfig(train='builtin:digits', batch=BATCH, size=(SIZE, SIZE)),
    model=MODEL, optim=OptimConfig(**COMMON | recipe.optim), steps=STEPS, **recipe.loss,
  )  # fmt: skip


def train_ours(recipe: Recipe):
  """Return (losses, start, parameters, averages), the last three as {path: array}."""
  config = make_config(recipe)
  task, counts = make_task(config), {'examples': BATCH, 'classes': CLASSES, 'label_slots': 1}
  program = make_program(config, task, **counts, devices=jax.devices()[:1])
  start, loss, teach = draw_params(program.param_shapes), task.loss, None
  if config.distill.teacher:
    teacher = unflatten_dict(draw_params(program.param_shapes, TEACHER_SEED), sep='/')
    teach = functools.partial(predict_logits, teacher, model=program.model)
    loss = add_teacher(loss, config.distill)
  params = unflatten_dict({path: jnp.array(x) for path, x in start.items()}, sep='/')
  tx, optim = program.tx, config.optim
  state = TrainState(
    step=jnp.int32(0), params=params, opt_state=tx.init(params), ema=jax.tree.map(jnp.copy, params)
  )

  @jax.jit
  def step(state, batch):
    return train_step(
      *(state, batch),
      model=program.model, tx=tx, loss=loss, lr=program.lr, seed=0, ema=optim.ema,
      sharpness=make_sharpness(optim, program.lr), teach=teach,
    )  # fmt: skip

  losses = []
  for images, targets in draw_batches():
    state, metrics = step(state, {'image': images, 'label': targets, 'mask': np.ones(BATCH, bool)})
    losses.append(float(metrics['loss']))
  return losses, start, *(flatten_dict(tree, sep='/') for tree in (state.params, state.ema))


def make_model(flat: dict[str, np.ndarray]):
  """Return timm's model with separate queries, keys and values, and {our path: its tensors}."""
  import torch
  from timm.models import VisionTransformer

  class Projections(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.query, self.key, self.value = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
      return torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)

  model = VisionTransformer(
    img_size=SIZE, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=2,
    num_classes=CLASSES, init_values=0.3,
  )  # fmt: skip
  for block in model.blocks:
    block.attn.qkv = Projections()
  tensors = {
    'cls': [model.cls_token],
    'Transformer/posembed_input/pos_embedding': [model.pos_embed],
    'embedding/kernel': [model.patch_embed.proj.weight],
    'embedding/bias': [model.patch_embed.proj.bias],
    'Transformer/encoder_norm/scale': [model.norm.weight],
    'Transformer/encoder_norm/bias': [model.norm.bias],
    'head/kernel': [model.head.weight],
    'head/bias': [model.head.bias],
  }
  block, attention = 'Transformer/encoderblock', 'MultiHeadDotProductAttention_1'
  layers = {
    'LayerNorm_0': lambda b: b.norm1, 'LayerNorm_2': lambda b: b.norm2,
    'MlpBlock_3/Dense_0': lambda b: b.mlp.fc1, 'MlpBlock_3/Dense_1': lambda b: b.mlp.fc2,
    f'{attention}/query': lambda b: b.attn.qkv.query, f'{attention}/key': lambda b: b.attn.qkv.key,
    f'{attention}/value': lambda b: b.attn.qkv.value, f'{attention}/out': lambda b: b.attn.proj,
  }  # fmt: skip
  for name, layer in layers.items():
    kernel = 'scale' if name.startswith('LayerNorm') else 'kernel'
    tensors[f'{block}/{name}/{kernel}'] = [layer(b).weight for b in model.blocks]
    tensors[f'{block}/{name}/bias'] = [layer(b).bias for b in model.blocks]
  tensors[f'{block}/attention_scale'] = [b.ls1.gamma for b in model.blocks]
  tensors[f'{block}/mlp_scale'] = [b.ls2.gamma for b in model.blocks]
  assert tensors.keys() == flat.keys()
  assert sum(map(len, tensors.values())) == len(list(model.parameters()))
  with torch.no_grad():
    for path, rows in tensors.items():
      blocks = flat[path] if 'encoderblock' in path else flat[path][None]
      for tensor, x in zip(rows, blocks, strict=True):
        tensor.copy_(torch.tensor(to_torch(path, x)))
  return model, tensors


def to_torch(path: str, x: np.ndarray) -> np.ndarray:
  """Return an array of one block in the layout of PyTorch."""
  if path == 'embedding/kernel':
    return x.transpose(3, 2, 0, 1)
  if path.endswith('/kernel'):
    inputs = WIDTH if path.split('/')[-2] != 'Dense_1' else 64
    return x.reshape(inputs, -1).T
  return x.reshape(-1) if path.endswith('/bias') else x


def learning_rate(optim: OptimConfig, step: int) -> float:
  """Return the cosine decay after a linear warm-up of ten steps, times the warm-up."""
  progress = max(step - 10, 0) / (STEPS - 10)
  decayed = optim.lr_end + (optim.lr - optim.lr_end) * (1 + math.cos(math.pi * progress)) / 2
  return decayed * min(1, step / 10)


def make_optimizers(optim: OptimConfig, tensors: dict[str, list]) -> list:
  """Return the optimizers of PyTorch or timm. Each group has a factor of the learning rate."""
  import timm.optim as timm_optim
  import torch

  matrices, others = [], []
  for path, rows in tensors.items():
    for i, tensor in enumerate(rows):
      after = path.startswith(('head/', 'Transformer/encoder_norm'))
      away = DEPTH - i if 'encoderblock' in path else 0 if after else DEPTH + 1
      group = {
        'params': [tensor],
        'factor': optim.layer_decay**away,
        'weight_decay': optim.weight_decay if path.endswith('/kernel') else 0.0,
      }
      hidden = path.endswith('/kernel') and 'encoderblock' in path
      (matrices if hidden and optim.name == 'muon' else others).append(group)
  betas = optim.b1, optim.b2
  if optim.name == 'sgd':
    return [torch.optim.SGD(others, lr=1.0, momentum=optim.b1)]
  if optim.name == 'lamb':
    return [timm_optim.Lamb(others, lr=1.0, betas=betas, max_grad_norm=None)]
  if optim.name == 'lion':
    return [timm_optim.Lion(others, lr=1.0, betas=betas)]
  optimizers = [torch.optim.AdamW(others, lr=1.0, betas=betas)]
  if matrices:
    optimizers.append(torch.optim.Muon(matrices, lr=1.0, adjust_lr_fn='match_rms_adamw'))
  return optimizers


def dot(ours: list, theirs: list):
  return sum((x * y).sum() for x, y in zip(ours, theirs, strict=True))


def replace_by_sharp_gradients(parameters: list, compute_loss, optim: OptimConfig, rate: float):
  """Replace the gradients by those of SAM, or of GSAM."""
  import torch

  rho = optim.sam_rho
  if optim.sam_rho_min:
    part = (rate - optim.lr_end) / (optim.lr - optim.lr_end)
    rho = optim.sam_rho_min + (optim.sam_rho - optim.sam_rho_min) * part
  clean = [p.grad.clone() for p in parameters]
  norm, saved = dot(clean, clean).sqrt(), [p.detach().clone() for p in parameters]
  with torch.no_grad():
    for p, g in zip(parameters, clean, strict=True):
      p.add_(rho * g / norm)
      p.grad = None
  compute_loss().backward()
  robust = [p.grad for p in parameters]
  part = dot(clean, robust) / dot(robust, robust)
  with torch.no_grad():
    for p, old, g in zip(parameters, saved, clean, strict=True):
      p.copy_(old)
      p.grad = p.grad - optim.gsam_alpha * (g - part * p.grad)


def train_torch(recipe: Recipe, flat: dict[str, np.ndarray], teacher_flat: dict[str, np.ndarray]):
  """Return (losses, parameters, averages), the last two as {our path: tensors}."""
  import torch
  from torch.nn import functional

  config = make_config(recipe)
  optim, distill = config.optim, config.distill
  model, tensors = make_model(flat)
  teacher = make_model(teacher_flat)[0].eval() if distill.teacher else None
  parameters, averages = list(model.parameters()), make_model(flat)[1]
  optimizers, losses = make_optimizers(optim, tensors), []
  for step, (images, targets) in enumerate(draw_batches()):
    x = torch.tensor((images.transpose(0, 3, 1, 2) - np.float32(127.5)) / np.float32(127.5))
    y = torch.tensor(targets)

    def compute_loss(x=x, y=y):
      logits = model(x)
      if config.loss == 'sigmoid':
        return functional.binary_cross_entropy_with_logits(logits, (y > 0.2).float())
      loss = functional.cross_entropy(logits, y)
      if teacher is None:
        return loss
      with torch.no_grad():
        probabilities = (teacher(x) / distill.temperature).softmax(dim=1)
      ours = (logits / distill.temperature).log_softmax(dim=1)
      divergence = functional.kl_div(ours, probabilities, reduction='batchmean')
      softened = distill.weight * distill.temperature**2 * divergence
      return softened + (1 - distill.weight) * loss

    rate = learning_rate(optim, step)
    for optimizer in optimizers:
      optimizer.zero_grad()
      for group in optimizer.param_groups:
        group['lr'] = rate * group['factor']
    loss = compute_loss()
    loss.backward()
    if optim.sam_rho:
      replace_by_sharp_gradients(parameters, compute_loss, optim, rate)
    torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip_norm)
    for optimizer in optimizers:
      optimizer.step()
    with torch.no_grad():
      for path, rows in averages.items():
        for mean, new in zip(rows, tensors[path], strict=True):
          mean.mul_(optim.ema).add_(new, alpha=1 - optim.ema)
    losses.append(loss.item())
  return losses, tensors, averages


def relative_distance(ours: dict, theirs: dict[str, list], start: dict) -> float:
  """Return the distance of all parameters, relative to how far they have moved.

  Biases of keys do not count: their gradient is rounding alone, which Adam turns into full steps.
  """
  difference, moved = 0.0, 0.0
  for path, rows in theirs.items():
    if path.endswith('key/bias'):
      continue
    x, old = (tree[path] if 'encoderblock' in path else tree[path][None] for tree in (ours, start))
    for block, before, tensor in zip(np.asarray(x), old, rows, strict=True):
      new = to_torch(path, block).astype(np.float64)
      difference += np.sum((new - tensor.detach().numpy()) ** 2)
      moved += np.sum((new - to_torch(path, before)) ** 2)
  return math.sqrt(difference / moved)


@pytest.mark.parametrize('name', RECIPES)
def test_a_hundred_steps_have_the_losses_of_an_independent_trainer(name, timm, monkeypatch):
  del timm  # Lets torchvision be imported, which timm does.
  torch = pytest.importorskip('torch')
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # Small arrays are slower on many.
  # PyTorch's Muon multiplies matrices in bfloat16.
  monkeypatch.setattr(torch.Tensor, 'bfloat16', lambda tensor: tensor.clone())
  recipe = RECIPES[name]
  losses, start, params, averages = train_ours(recipe)
  teacher = draw_params(unflatten_dict(start, sep='/'), TEACHER_SEED)
  expected, their_params, their_averages = train_torch(recipe, start, teacher)
  torch.set_num_threads(threads)
  difference = np.max(np.abs(np.subtract(losses, expected)) / np.abs(expected))
  print(f'{name}: {difference:.0e}')
  assert np.mean(expected[-10:]) < 0.9 * np.mean(expected[:10])  # The model learns.
  assert difference <= TOLERANCE
  assert relative_distance(params, their_params, start) < 1e-3
  assert relative_distance(averages, their_averages, start) < 1e-3


def markdown(figures: dict[str, str]) -> str:
  """Return the table of docs/guides/optimizers.md."""
  rows = ['| recipe | checked against | largest relative difference of a loss |', '|---|---|---|']
  rows += [f'| {name} | {RECIPES[name].against} | {figures[name]} |' for name in RECIPES]
  return '\n'.join(rows)


def test_the_guide_has_the_recorded_differences():
  figures = json.loads(FIGURES.read_text(encoding='utf-8'))
  assert markdown(figures) in GUIDE.read_text(encoding='utf-8')
  assert all(float(figure) <= TOLERANCE for figure in figures.values())


if __name__ == '__main__':
  lines = (line.lstrip('.').rpartition(': ') for line in sys.stdin.read().splitlines())
  recorded = {name: figure for name, _, figure in lines if name in RECIPES}
  recorded = {name: recorded[name] for name in RECIPES}
  FIGURES.write_text(json.dumps(recorded, indent=2) + '\n', encoding='utf-8')
  print(markdown(recorded))
