"""The paper's experiments in miniature: models of each family on images that fit in a package.

    python run_pretrain.py --config=configs/mini.py:ViT-M,fashion_mnist
    python -m vit_jax tables mini

Argument: a model (below) and a data set: fashion_mnist, digits, or flowers, which is a folder
(--config.data.train=folder:PHOTOS).
After "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 4: 32x32 pixels instead of
224x224, 16 patches instead of 196, and Table 3's recipe for JFT-300M (Adam, weight decay 0.1,
linear decay, no dropout) with other learning rates.
Cost: 200 steps of 96 images; ViT-M takes 0.45 TFLOPs, R-L 1.6.
Expected: results/README.md. Run here.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean

# The comments give the multiply-adds of a forward pass over 32x32 pixels in millions. Models of the
# same size letter need about the same compute. The learning rates are the better of two that were
# tried with ViT-M and with R-M.
# name: (variant, stem width, width, depth, mlp, heads, learning rate)
MODELS = {
  'ViT-S':   ('Ti/8',        64,  64,  3,   128,  4, 4e-3),  # 2.0
  'ViT-M':   ('Ti/8',        64,  80,  4,   160,  4, 4e-3),  # 3.9
  'ViT-L':   ('Ti/8',        64, 160,  4,   320,  5, 4e-3),  # 14.8
  'R-M':     ('R1.1x1',      32,   0,  0,     0,  0, 8e-3),  # 4.0
  'R-L':     ('R1.1x2',      32,   0,  0,     0,  0, 8e-3),  # 14.2
  'R+ViT-M': ('R1.1+Ti/8',   32,  40,  2,    80,  2, 4e-3),  # 4.7
  'R+ViT-L': ('R1.1+Ti/8',   32, 128,  4,   256,  4, 4e-3),  # 13.7
}  # fmt: skip

# data: (source, training split, evaluation split, flip). A mirrored digit has no class.
DATA = {
  'fashion_mnist': ('builtin:fashion_mnist', 'train[:4000]', 'test[:5000]', True),
  'digits': ('builtin:digits', 'train[:1000]', 'test', False),
  'flowers': ('folder:photos', 'train', '', True),
}


def get_config(argument: str = 'ViT-M,fashion_mnist') -> Config:
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
      batch=96,
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
    steps=200,
    log_every='50',
    eval_every='0',
    probes=('fewshot:builtin:digits',),
    save_every='50%',
  )
