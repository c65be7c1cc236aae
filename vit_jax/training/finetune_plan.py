"""The plan of `vit-jax finetune`: the settings that suit a model, its images and the devices.

The tables below are the whole of it. The learning rate on a CPU and the label smoothing were chosen
among four runs on photos of flowers (ViT-S/14). Each other number is a common choice of the
literature, not a result of a search. Table 4 of the paper is configs/finetune.py.
"""

import dataclasses

import numpy as np

from vit_jax.data.preprocessing import CROPS_AFTER_RESIZE
from vit_jax.pretrained.model import PretrainedModel


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
  """Settings that depend on the devices alone."""

  batch: int
  eval_batch: int
  lr: float  # At `batch`.
  dtype: str
  unroll: int
  workers: int
  max_patches: int  # More patches of an image are avoided by a smaller image. 0 means no limit.
  max_eval_patches: int  # The same for evaluation, which needs a third of the time of training.
  seconds: float  # Default time of a run. 0 means that the number of epochs decides.


# Platform of JAX -> plan. A CPU has no fast bfloat16, and its time is what limits a run.
DEVICE_PLANS = {
  'cpu': DevicePlan(
    batch=20, eval_batch=25, lr=2e-4, dtype='float32', unroll=0, workers=0, max_patches=100,
    max_eval_patches=256, seconds=330,
  ),
  'gpu': DevicePlan(
    batch=128, eval_batch=256, lr=5e-4, dtype='bfloat16', unroll=1, workers=8, max_patches=0,
    max_eval_patches=0, seconds=0,
  ),
  'tpu': DevicePlan(
    batch=256, eval_batch=256, lr=7e-4, dtype='bfloat16', unroll=1, workers=16, max_patches=0,
    max_eval_patches=0, seconds=0,
  ),
}  # fmt: skip
# (images below this number, epochs)
EPOCHS = ((1_000, 30), (10_000, 20), (100_000, 10), (1_000_000, 5), (float('inf'), 2))
# (blocks up to this number, factor between the learning rates of neighbouring blocks)
LAYER_DECAYS = ((12, 0.8), (24, 0.85), (float('inf'), 0.9))
LABEL_SMOOTHING = 0.1
LORA_LR_FACTOR = 5  # Adapters have a higher learning rate than full fine-tuning, without decay.
UNBALANCED = 3  # Times as many images of the largest class as of the smallest.
MIN_STEPS = 20  # Fewer do not pay for the warm-up.


def plan_settings(
  model: PretrainedModel,
  platform: str,
  *,
  source: str,
  images: int,
  max_labels: int,
  class_counts: np.ndarray | None = None,
  keep_size: bool = False,
  devices: int = 1,
) -> dict[str, object]:
  """Return {'data.batch': 20, …}: the settings that differ from those of configs/finetune.py.

  Args:
    model: the pre-trained model.
    platform: 'cpu', 'gpu' or 'tpu'.
    source: the name of the data, such as 'folder:photos'.
    images: the number of training images.
    max_labels: the largest number of labels of an image.
    class_counts: the number of images of each class, if it is known.
    keep_size: use the size of the model on every device.
    devices: the number of devices of all hosts, which divides the batches.
  """
  device = DEVICE_PLANS[platform]
  limits = (0, 0) if keep_size else (device.max_patches, device.max_eval_patches)
  size, eval_size = (plan_size(model, limit) for limit in limits)
  batch = divisible(min(device.batch, images), devices)
  return {
    'data.train': source,
    'data.batch': batch,
    'data.eval_batch': divisible(device.eval_batch, devices),
    'data.size': size,
    'data.eval_size': (0, 0) if eval_size == size else eval_size,
    'data.crop_area': (0.4, 1.0),
    'data.workers': device.workers,
    **plan_eval_steps(model, eval_size),
    **plan_model(model, device),
    'optim.name': 'adamw',
    'optim.lr': float(f'{device.lr * (batch / device.batch) ** 0.5:.3g}'),
    'optim.momentum_dtype': 'float32',
    'optim.weight_decay': 0.05,
    'optim.warmup': '10%',
    'init_positions': model.positions,
    **plan_loss(max_labels, class_counts),
    'steps': 0,
    'epochs': float(next(epochs for limit, epochs in EPOCHS if images < limit)),
    'log_every': '5%',
    'eval_every': '0' if device.seconds else '1ep',
    'save_every': '0' if device.seconds else '1ep',
  }


def divisible(batch: int, devices: int) -> int:
  """Return the largest multiple of `devices` up to `batch`, and at least one image each."""
  return max(1, batch // devices) * devices


def plan_model(model: PretrainedModel, device: DevicePlan) -> dict[str, object]:
  """Return the settings of the model, and the decay of the learning rate over its blocks."""
  settings: dict[str, object] = {
    **{f'model.{name}': value for name, value in dataclasses.asdict(model.config).items()},
    'model.dtype': device.dtype,
    'model.head_bias': 0.0,
    'model.hidden_head': False,
  }
  if is_transformer(model):
    depth = model.model.shape.depth
    settings['optim.layer_decay'] = next(decay for limit, decay in LAYER_DECAYS if depth <= limit)
    settings['model.unroll'] = device.unroll
  return settings


def plan_lora(settings: dict[str, object], rank: int) -> dict[str, object]:
  """Return the plan for full fine-tuning, changed for adapters of a rank."""
  lr = float(f'{LORA_LR_FACTOR * settings["optim.lr"]:.3g}')
  return settings | {'lora.rank': rank, 'optim.lr': lr, 'optim.layer_decay': 1.0}


def plan_loss(max_labels: int, class_counts: np.ndarray | None) -> dict[str, object]:
  """Return the settings of the head and the loss. Only a class alone can be probed and weighted."""
  if max_labels > 1:
    return {'init_head': 'new', 'loss': 'sigmoid'}
  weights = 'balanced' if is_unbalanced(class_counts) else 'none'
  return {
    'init_head': 'probe',
    'loss': 'softmax',
    'label_smoothing': LABEL_SMOOTHING,
    'class_weights': weights,
  }


def is_unbalanced(class_counts: np.ndarray | None) -> bool:
  """Return whether the largest class has many more images than the smallest that has any."""
  if class_counts is None:
    return False
  used = class_counts[class_counts > 0]
  return used.max() >= UNBALANCED * used.min()


def plan_size(model: PretrainedModel, max_patches: int) -> tuple[int, int]:
  """Return the size of the model, or the largest of the same shape with at most `max_patches`."""
  rows, columns = model.grid
  if not max_patches or rows * columns <= max_patches or not is_transformer(model):
    return model.size
  scale = (max_patches / (rows * columns)) ** 0.5
  height, width = (max(1, int(side * scale)) for side in (rows, columns))
  return height * model.size[0] // rows, width * model.size[1] // columns


def is_transformer(model: PretrainedModel) -> bool:
  """Return whether the model has blocks, so that its cost grows with the patches of an image."""
  return bool(getattr(model.model.shape, 'depth', 0))


def plan_eval_steps(model: PretrainedModel, size: tuple[int, int]) -> dict[str, object]:
  """Return the settings of the model's preprocessing, scaled to another image size."""
  steps = model.preprocessing
  settings: dict[str, object] = {
    'data.eval_crop': steps.crop,
    'data.interpolation': steps.interpolation,
  }
  if steps.crop in CROPS_AFTER_RESIZE:
    ratio = max(steps.resize_size) / max(steps.size)
    settings['data.eval_short_side'] = max(max(size), round(max(size) * ratio))
  return settings


def fit_into_seconds(
  seconds: float, *, step: float, overhead: float, eval_images: float, batch: int
) -> int:
  """Return the number of steps that fit into a time.

  Args:
    seconds: the time that is left.
    step: seconds of a training step, which costs three forward passes of its batch.
    overhead: seconds for starting and compiling the run.
    eval_images: images of the training size of which features or logits are computed, for the
      probe and the last evaluation. A larger image counts as several.
    batch: images in a step.
  """
  evaluation = eval_images * step / (3 * batch)
  return int((seconds - overhead - evaluation) / step)
