"""The paper's experiments in miniature: three sizes of each family, on CIFAR-10 and Fashion-MNIST.

    python run_pretrain.py --config=configs/mini.py:ViT-S,fashion_mnist
    python -m vit_jax tables mini

Argument: a model (below) and a data set: cifar10, fashion_mnist (all 60,000 images, from Debian's
dataset-fashion-mnist), digits, or flowers, which is a folder (--config.data.train=folder:PHOTOS).
After "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 4: 32x32 pixels instead of
224x224, 64 patches instead of 196, and Table 3's recipe for JFT-300M (Adam, weight decay 0.1,
linear decay, no dropout) with other learning rates.
Cost: 2,000 steps of 64 images; a model of size S takes 3 TFLOPs, M 6, L 10.
Expected: results/README.md.

The design of `tables mini`, for about 8 hours of two CPU cores:
  data     all 50,000 images of CIFAR-10, all 60,000 of Fashion-MNIST; 1/16, 1/4 and all of them
  compute  sizes S, M and L with about 4, 8 and 14 million multiply-adds; 1/16, 1/4 and all steps
  steps    2,000 for every part of the data: 2.6 epochs of all CIFAR-10, 41 of a sixteenth
  rates    three for each model, at 1/4 of the steps, on a held-out tenth of the training images
  seeds    three; the learning rates are chosen with the first
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean

# The comments give the multiply-adds of a forward pass over 32x32 pixels in millions. Models of the
# same size letter need about the same compute. `tables mini` replaces the learning rates by the
# best on held-out images.
# name: (variant, stem width, width, depth, mlp, heads, learning rate)
MODELS = {
  'ViT-S':   ('Ti/4',        64,  40,  3,    80,  2, 2e-3),  # 3.6
  'ViT-M':   ('Ti/4',        64,  48,  5,    96,  3, 2e-3),  # 8.2
  'ViT-L':   ('Ti/4',        64,  64,  5,   128,  4, 2e-3),  # 13.6
  'R-S':     ('R1.1x1',      32,   0,  0,     0,  0, 4e-3),  # 4.0
  'R-M':     ('R3.3x1',      32,   0,  0,     0,  0, 4e-3),  # 7.9
  'R-L':     ('R1.1x2',      32,   0,  0,     0,  0, 4e-3),  # 13.7
  'R+ViT-S': ('R1.1+Ti/8',   32,  32,  1,    64,  2, 2e-3),  # 4.3
  'R+ViT-M': ('R1.1+Ti/8',   32,  80,  4,   160,  4, 2e-3),  # 8.0
  'R+ViT-L': ('R1.1+Ti/8',   32,  96,  6,   192,  4, 2e-3),  # 12.2
}  # fmt: skip

# data: (source, training split, evaluation split, flip). A mirrored digit has no class.
DATA = {
  'cifar10': ('tfds:cifar10', 'train', 'test', True),
  'fashion_mnist': ('idx:/usr/share/datasets/fashion-mnist', 'train', 'test', True),
  'digits': ('builtin:digits', 'train[:1000]', 'test', False),
  'flowers': ('folder:photos', 'train', '', True),
}


def get_config(argument: str = 'ViT-S,cifar10') -> Config:
  """Return the config for 'MODEL,DATA'. Raises UserError for an unknown model or data set."""
  model, _, data = argument.partition(',')
  for name, table in ((model, MODELS), (data, DATA)):
    if name not in table:
      raise UserError(f'configs/mini.py:{argument}: unknown {name!r}.{did_you_mean(name, table)}')
  variant, stem, width, depth, mlp, heads, lr = MODELS[model]
  source, split, eval_split, flip = DATA[data]
  shape = {'width': width, 'depth': depth, 'mlp': mlp, 'heads': heads}
  stem = {'stem_width': stem} if variant.startswith('R') else {}
  # The blocks stay in a loop. Unrolled they compile for three times as long, and runs are short.
  return Config(
    data=DataConfig(
      train=source,
      split=split,
      eval_split=eval_split,
      batch=64,
      eval_batch=480,
      size=(32, 32),
      crop='resize',
      flip=flip,
    ),
    model=ModelConfig(variant=variant, **shape, **stem),
    optim=OptimConfig(
      name='adamw',
      lr=lr,
      schedule='linear',
      warmup='10%',
      lr_end=1e-5,
      weight_decay=0.1,
      grad_clip_norm=1.0,
    ),
    steps=2000,
    log_every='50',
    eval_every='0',
    probes=('fewshot:builtin:digits',),
    save_every='25%',
  )
