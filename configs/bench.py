"""The training step that speed is measured on: ImageNet at 224 px, bfloat16, Adam.

    python -m vit_jax plan --config configs/bench.py:B/16 --config.data.batch=512 --topology v5e:2x2
    python run_pretrain.py --config=configs/bench.py:B/16

Argument: a variant.
Model: "An Image is Worth 16x16 Words" (arXiv 2010.11929), with a class token and a linear head.
Softmax loss, gradient clipping, weight decay, and a bfloat16 first moment. No dropout, no remat,
data parallel.
Cost: compiled only. No training run is needed.
Expected, on four v5e chips, by the compiler's estimates: B/16 with the command above 169.9 M cycles
and 6.04 GiB; S/16 with a batch of 1,024 140.7 M and 5.43; L/16 with 128 147.8 M and 6.34.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config(argument: str = 'B/16') -> Config:
  """Return the config of the plain encoder of a variant."""
  return Config(
    data=DataConfig(train='tfds:imagenet2012', eval_split='validation', batch=512, size=(224, 224)),
    model=ModelConfig(variant=argument, dtype='bfloat16', unroll=0),
    optim=OptimConfig(
      name='adamw',
      lr=1e-3,
      warmup='10000',
      weight_decay=0.1,
      grad_clip_norm=1.0,
      momentum_dtype='bfloat16',
    ),
    epochs=300,
  )
