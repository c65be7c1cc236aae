"""Small ViTs trained on CIFAR from scratch, at least as accurate as results that others published.

    python run_pretrain.py --config=configs/cifar.py:vit_lite
    python run_pretrain.py --config=configs/cifar.py:vit_lite,cifar100
    python run_pretrain.py --config=configs/cifar.py:fast --config.data.train=folder:cifar10

Argument: NAME[,DATA] with DATA cifar10 (the default) or cifar100, and NAME
  vit_lite       ViT-Lite-7/4, 3.7 M parameters (arXiv 2104.05704, Compact-Transformers)
  spt_lsa        the plain ViT of "Vision Transformer for Small-Size Datasets" (arXiv 2112.13492)
  vit_cifar      the ViT of 6.3 M parameters of omihub777/ViT-CIFAR
  vit_512_short  the ViT of width 512 of kentaroy47/vision-transformers-cifar10, 100 epochs
  vit_512_long   the same, 200 epochs
  scratch        the ViT of width 128 of s-chh/PyTorch-Scratch-Vision-Transformer-ViT
  fast           a ViT of our own with Muon, for 94 %
All at 32 pixels with patches of 4, AdamW (`fast`: Muon) and cosine decay.
Cost: a forward pass takes 0.1 to 1.4 GFLOPs, and a run 3 to 43 PFLOPs. 43 are 9 minutes of one
H100 at 8 % of its peak (an estimate). `vit-jax reproduce` has a row for each. Not run here.
Expected top-1 of CIFAR-10, as published: 91.38 for vit_lite (69.75 on CIFAR-100), 93.58 for
spt_lsa, 90.92 for vit_cifar, 85 and 89 for vit_512 after 500 and 1,000 epochs, 86.3 for scratch;
`fast` aims at 94.

The models are those of the authors. What else differs, the rows of `vit-jax reproduce` say: no
recipe has AutoAugment, which three of the authors use, and RandAugment as in timm (2 operations at
magnitude 9) replaces it. Images are padded by reflection, not with zeros.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.settings.fields import with_settings

DATA = ('cifar10', 'cifar100')
_ALL_MIXED = {'mixup': 0.8, 'cutmix': 1.0, 'data.random_erasing': 0.25}
# NAME: (width, depth, mlp, heads, epochs, batch, learning rate, weight decay, other settings)
RECIPES = {
  'vit_lite': (256, 7, 512, 4, 200, 128, 5e-4, 0.03, {'optim.warmup': '5ep'}),
  # The authors train for 100 epochs with three copies of each image.
  'spt_lsa': (192, 9, 384, 12, 300, 256, 1e-3, 0.05, {'optim.warmup': '30ep'} | _ALL_MIXED),
  'vit_cifar': (
    384, 7, 384, 12, 200, 128, 1e-3, 0.05, {'optim.warmup': '5ep', 'optim.lr_end': 1e-5},
  ),
  'vit_512_short': (512, 6, 512, 8, 100, 512, 5e-4, 0.05, {'optim.warmup': '5ep'}),
  'vit_512_long': (512, 6, 512, 8, 200, 512, 5e-4, 0.05, {'optim.warmup': '5ep'}),
  'scratch': (
    128, 6, 256, 4, 200, 128, 5e-4, 1e-3,
    {
      'optim.warmup': '10ep', 'optim.lr_end': 1e-5, 'optim.grad_clip_norm': 0.0,
      'model.dropout': 0.1, 'model.drop_path': 0.0, 'data.randaug_magnitude': 3.0,
      'label_smoothing': 0.0,
    },
  ),
  'fast': (
    384, 9, 768, 6, 200, 512, 2e-3, 0.05,
    {'optim.name': 'muon', 'optim.warmup': '5ep', 'optim.ema': 0.999, 'model.pool': 'gap'}
    | _ALL_MIXED,
  ),
}  # fmt: skip


def get_config(argument: str = 'vit_lite') -> Config:
  """Return the config for 'NAME[,DATA]'. Raises UserError for another argument."""
  name, _, data = argument.partition(',')
  if name not in RECIPES or data not in ('', *DATA):
    near = did_you_mean(argument, RECIPES)
    raise UserError(f'--config=cifar:{argument}: expected NAME[,DATA].{near}')
  width, depth, mlp, heads, epochs, batch, lr, weight_decay, settings = RECIPES[name]
  config = Config(
    data=DataConfig(
      train=f'tfds:{data or DATA[0]}',
      batch=batch,
      eval_batch=1000,
      size=(32, 32),
      crop='simple',
      randaug_ops=2,
      randaug_magnitude=9.0,
      randaug_variant='timm',
      train_interpolation='pil_bilinear',
      workers=12,
    ),
    model=ModelConfig(
      variant='Ti/4',
      width=width,
      depth=depth,
      mlp=mlp,
      heads=heads,
      drop_path=0.1,
      gelu='erf',
      mean=(125.3, 123.0, 113.9),
      scale=(63.0, 62.1, 66.7),
      dtype='bfloat16',
      unroll=0,
    ),
    optim=OptimConfig(
      name='adamw', lr=lr, schedule='cosine', weight_decay=weight_decay, grad_clip_norm=1.0
    ),
    epochs=float(epochs),
    label_smoothing=0.1,
    log_every='1ep',
    eval_every='25%',
    save_every='5%',
  )
  return with_settings(config, settings)
