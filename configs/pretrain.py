"""Pre-training: "An Image is Worth 16x16 Words" (arXiv 2010.11929), Table 3.

    python run_pretrain.py --config=configs/pretrain.py:B/16,imagenet21k \\
      --config.data.train=folder:/data/imagenet21k

Argument: a variant and a data set (imagenet, imagenet21k, jft), and the number of epochs where the
table has two rows: `L/16,imagenet21k,30`. `RECIPES` below lists the variants of each data set.
Cost in TPUv3-core-days (Table 2): L/16 on ImageNet-21k 230, L/16 on JFT-300M 680, H/14 on JFT-300M
2,500. Not run here.
Expected (precision at 1 on the validation split, google-research/vision_transformer issue 62):
ImageNet-21k B/16 47.9, B/32 44.0, L/16 49.9, L/32 45.4, H/14 49.1; ImageNet before fine-tuning
B/32 69.2, B/16 74.8, L/32 66.9, L/16 72.6.

The ResNets are of version 1, as are the stems of the hybrids. The paper does not say which version
its ResNets have. configs/bit_pretrain.py trains them with SGD, for Table 7.
JFT-300M is not public, and TFDS does not have ImageNet-21k. Set --config.data.train to your own
copy or to a substitute.
"""

from vit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.variants import AXIAL_VIT_PREFIX

# Table 3. All rows have batch 4,096, a warm-up of 10,000 steps, and Adam's betas 0.9 and 0.999.
# (variant, data): (epochs of the rows, learning rate, schedule, weight decay, dropout)
RECIPES = {
  ('B/16', 'jft'):         ((7,),    8e-4, 'linear', 0.1,  0.0),
  ('B/32', 'jft'):         ((7,),    8e-4, 'linear', 0.1,  0.0),
  ('L/32', 'jft'):         ((7,),    6e-4, 'linear', 0.1,  0.0),
  ('L/16', 'jft'):         ((7, 14), 4e-4, 'linear', 0.1,  0.0),
  ('H/14', 'jft'):         ((14,),   3e-4, 'linear', 0.1,  0.0),
  ('R50+B/16', 'jft'):     ((7,),    8e-4, 'linear', 0.1,  0.0),
  ('R50+B/32', 'jft'):     ((7,),    8e-4, 'linear', 0.1,  0.0),
  ('R50+L/32', 'jft'):     ((7,),    2e-4, 'linear', 0.1,  0.0),
  ('R50+L/16', 'jft'):     ((7, 14), 4e-4, 'linear', 0.1,  0.0),
  # Only Table 6 has R152x2 in 14 epochs and R200x3. They have the learning rate of the R152s.
  ('R50x1', 'jft'):        ((7,),    1e-3, 'linear', 0.1,  0.0),
  ('R50x2', 'jft'):        ((7,),    1e-3, 'linear', 0.1,  0.0),
  ('R101x1', 'jft'):       ((7,),    8e-4, 'linear', 0.1,  0.0),
  ('R152x1', 'jft'):       ((7,),    6e-4, 'linear', 0.1,  0.0),
  ('R152x2', 'jft'):       ((7, 14), 6e-4, 'linear', 0.1,  0.0),
  ('R200x3', 'jft'):       ((14,),   6e-4, 'linear', 0.1,  0.0),
  # Only Figure 13 has the axial models. They have the recipes of the plain models.
  ('AxialViT-B/16', 'jft'): ((7,),   8e-4, 'linear', 0.1,  0.0),
  ('AxialViT-B/32', 'jft'): ((7,),   8e-4, 'linear', 0.1,  0.0),
  ('AxialR50x1', 'jft'):   ((7,),    1e-3, 'linear', 0.1,  0.0),
  ('B/16', 'imagenet21k'): ((90,),   1e-3, 'linear', 0.03, 0.1),
  ('B/32', 'imagenet21k'): ((90,),   1e-3, 'linear', 0.03, 0.1),
  ('L/16', 'imagenet21k'): ((90, 30), 1e-3, 'linear', 0.03, 0.1),
  ('L/32', 'imagenet21k'): ((90, 30), 1e-3, 'linear', 0.03, 0.1),
  ('B/16', 'imagenet'):    ((300,),  3e-3, 'cosine', 0.3,  0.1),
  ('B/32', 'imagenet'):    ((300,),  3e-3, 'cosine', 0.3,  0.1),
  ('L/16', 'imagenet'):    ((300,),  3e-3, 'cosine', 0.3,  0.1),
  ('L/32', 'imagenet'):    ((300,),  3e-3, 'cosine', 0.3,  0.1),
}  # fmt: skip

# data: (source, training split, evaluation split). big_vision holds out the first images of
# ImageNet-21k.
DATA = {
  'imagenet': ('tfds:imagenet2012', 'train', 'validation'),
  'imagenet21k': ('folder:imagenet21k', 'train[51200:]', 'train[:25600]'),
  'jft': ('folder:jft', 'train[50000:]', 'train[:50000]'),
}


def get_config(argument: str = 'B/16,imagenet21k') -> Config:
  """Return the row of Table 3 for 'VARIANT,DATA' or 'VARIANT,DATA,EPOCHS'.

  Raises UserError if the table has no such row.
  """
  variant, data, (epochs, lr, schedule, weight_decay, dropout) = find_row(argument)
  source, split, eval_split = DATA[data]
  large = variant in ('L/16', 'L/32', 'H/14')
  return Config(
    data=DataConfig(
      train=source,
      split=split,
      eval_split=eval_split,
      batch=4096,
      size=(224, 224),
      eval_crop='center',
      workers=16,
    ),
    model=model_config(variant, dropout=dropout, large=large),
    mesh=MeshConfig(fsdp=16 if large else 1),
    optim=OptimConfig(
      name='adamw',
      lr=lr,
      schedule=schedule,
      warmup='10000',
      lr_end=1e-5 if schedule == 'linear' else 0.0,
      weight_decay=weight_decay,
      grad_clip_norm=1.0 if data == 'imagenet' else 0.0,
      momentum_dtype='bfloat16',
    ),
    epochs=float(epochs),
    loss='sigmoid',
    # google-research/vision_transformer issue 153 and Scenic's config; not in the paper.
    label_smoothing=1e-4 if data == 'imagenet' else 0.0,
    eval_every='5000',
    save_every='5000',
  )


def find_row(argument: str) -> tuple[str, str, tuple]:
  """Return (variant, data, row of RECIPES with one number of epochs) for the argument."""
  variant, _, rest = argument.partition(',')
  data, _, epochs = rest.partition(',')
  if (variant, data) not in RECIPES:
    nearest = did_you_mean(f'{variant},{data}', [','.join(row) for row in RECIPES])
    raise UserError(f'configs/pretrain.py:{argument}: Table 3 has no such row.{nearest}')
  choices, *row = RECIPES[variant, data]
  if epochs and epochs not in map(str, choices):
    known = ' and '.join(map(str, choices))
    raise UserError(f'configs/pretrain.py:{argument}: Table 3 has {known} epochs, not {epochs}')
  return variant, data, (epochs or choices[0], *row)


def model_config(variant: str, *, dropout: float, large: bool) -> ModelConfig:
  """Return the model of a variant.

  Unrolled, XLA fuses more operations and stores less: B/16 on v5e takes 30 % fewer cycles than in a
  loop with remat='vit'. The 24 and 32 blocks of L and H would compile for half an hour. In a loop,
  sharded over 16 devices of v5e:16x16, a step of L/16 takes 86 M cycles and 2 of 16 GiB, and one of
  H/14 takes 217 M cycles and 4 GiB. Data parallel, where each device updates all parameters, L/16
  takes 90 M unrolled and 118 M in a loop, and H/14 282 M. These are estimates of `plan`.
  """
  settings = {}
  if '/' in variant:
    settings |= {'dropout': dropout, 'hidden_head': True}
    settings |= {'unroll': 1, 'remat': 'vit'} if large else {'unroll': 0}
  if variant.startswith(AXIAL_VIT_PREFIX):
    settings |= {'pool': 'gap'}
  # The initial bias makes the sigmoid loss predict "no class"
  # (google-research/vision_transformer issues 2 and 89).
  return ModelConfig(variant=variant, head_bias=-10.0, dtype='bfloat16', **settings)
