"""The config of the smallest run that uses every random draw. tests/runs.py starts it."""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
  """Return a config whose step takes a few milliseconds.

  The optimizer is SGD: Adam's first step is the sign of the gradient, which amplifies rounding.
  """
  return Config(
    data=DataConfig(train='builtin:digits', batch=16, eval_batch=16, size=(8, 8)),
    model=ModelConfig(variant='mu/4', depth=2, dropout=0.1, drop_path=0.1),
    optim=OptimConfig(
      name='sgd', lr=1e-2, warmup='2', weight_decay=0.1, grad_clip_norm=1.0, ema=0.9
    ),
    mixup=0.2,
    steps=60,
    log_ids=True,
    log_every='1',
    eval_every='20',
    save_every='20',
    max_to_keep=3,
  )
