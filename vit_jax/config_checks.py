"""What a setting of config.py may be."""

import dataclasses
import math
import typing

CHOICES = {
  'data.crop': ('inception', 'resize', 'random'),
  'data.eval_crop': ('resize', 'center'),
  'data.bad_images': ('error', 'skip'),
  'model.pool': ('token', 'gap', 'map'),
  'model.position': ('learned', 'learned2d', 'relative', 'sincos2d', 'none'),
  'model.position_at': ('stem', 'every', 'shared'),
  'model.attention': ('auto', 'xla', 'pallas', 'cudnn'),
  'model.gelu': ('tanh', 'erf'),
  'model.dtype': ('float32', 'bfloat16'),
  'model.remat': ('none', 'vit', 'dots', 'full'),
  'mask.target': ('', 'colour', 'grid', 'pixels'),
  'optim.name': ('adamw', 'sgd', 'adafactor', 'rmsprop'),
  'optim.schedule': ('cosine', 'linear', 'rsqrt', 'constant', 'staircase'),
  'optim.momentum_dtype': ('float32', 'bfloat16'),
  'optim.grad_dtype': ('float32', 'bfloat16'),
  'loss': ('softmax', 'sigmoid'),
  'init_positions': ('corner', 'half_pixel', 'bicubic'),
}

# Closed ranges. A number that is not listed may be anything.
RANGES = {
  'data.unlabelled_ratio': (1, 1000),
  'data.confidence_threshold': (0, 1),
  'data.unlabelled_per_class': (1, math.inf),
  'data.batch': (1, math.inf),
  'data.eval_batch': (0, math.inf),
  'data.randaug_ops': (0, 7),
  'data.randaug_magnitude': (0, 30),
  'data.resize_before_crop': (0, math.inf),
  'data.eval_short_side': (1, math.inf),
  'data.max_bad_fraction': (0, 1),
  'data.max_pixels': (1, math.inf),
  'data.workers': (0, 1024),
  'data.threads': (0, 1024),
  'data.prefetch': (1, 64),
  'model.width': (0, math.inf),
  'model.depth': (0, math.inf),
  'model.mlp': (0, math.inf),
  'model.heads': (0, math.inf),
  'model.stem_width': (32, math.inf),
  'model.registers': (0, math.inf),
  'model.dropout': (0, 0.99),
  'model.drop_path': (0, 0.99),
  'model.norm_eps': (0, 1),
  'model.unroll': (0, math.inf),
  'optim.lr': (0, math.inf),
  'optim.lr_end': (0, math.inf),
  'optim.rsqrt_timescale': (1, math.inf),
  'optim.lr_boundary_factor': (0, 1),
  'optim.norm_momentum': (0, 0.99999),
  'optim.b1': (0, 0.99999),
  'optim.b2': (0, 0.99999),
  'optim.weight_decay': (0, math.inf),
  'optim.head_weight_decay_factor': (0, math.inf),
  'optim.grad_clip_norm': (0, math.inf),
  'optim.layer_decay': (0.01, 1),
  'optim.ema': (0, 0.999999),
  'optim.grad_accum_steps': (1, math.inf),
  'optim.skip_spikes': (0, math.inf),
  'optim.spike_window': (2, math.inf),
  'optim.max_bad_steps': (1, math.inf),
  'mesh.fsdp': (1, math.inf),
  'mask.rate': (0.001, 1),
  'steps': (0, math.inf),
  'epochs': (0, math.inf),
  'seed': (0, 2**31 - 1),
  'label_smoothing': (0, 0.99),
  'mixup': (0, math.inf),
  'fewshot_l2': (1e-9, math.inf),
  'max_to_keep': (1, math.inf),
  'first_step_timeout': (0, 604800),
  'step_timeout': (0, 604800),
}


def setting_types(cls, prefix: str = '') -> dict[str, type]:
  """{'data.batch': int, …}: the type of every setting, by the same names."""
  out = {}
  for f in dataclasses.fields(cls):
    out |= (
      setting_types(f.type, f'{prefix}{f.name}.')
      if dataclasses.is_dataclass(f.type)
      else {prefix + f.name: f.type}
    )
  return out


def has_type(kind: type, value) -> bool:
  """A whole number is a number, and True is none."""
  if parts := typing.get_args(kind):
    parts = parts[:1] * len(value) if parts[-1] is Ellipsis and isinstance(value, tuple) else parts
    return (
      isinstance(value, tuple) and len(value) == len(parts) and all(map(has_type, parts, value))
    )
  return isinstance(value, (int, float) if kind is float else kind) and (
    kind is bool or not isinstance(value, bool)
  )


def format_type(kind: type) -> str:
  """A type as a person says it."""
  parts = typing.get_args(kind)
  if parts and parts[-1] is Ellipsis:
    return 'texts in parentheses, any number of them'
  if parts:
    return f'{len(parts)} {"whole numbers" if parts[0] is int else "numbers"}'
  return {int: 'a whole number', float: 'a number', str: 'text', bool: 'True or False'}[kind]
