"""Fine-tuning: "An Image is Worth 16x16 Words" (arXiv 2010.11929), Table 4.

    python run_finetune.py --config=configs/finetune.py:B/16,cifar10 --config.init=B_16.npz
    python run_finetune.py --config=configs/finetune.py:S/16,folder --config.init=S_16.npz \\
      --config.data.train=folder:photos

Argument: a variant and a data set: imagenet, cifar100, cifar10, pets, flowers, folder, or a task of
VTAB-1k such as vtab/caltech101.
SGD with momentum 0.9, batch 512, cosine decay, no weight decay, gradients clipped to 1, 384 px, no
crop in evaluation. For ResNets the paper reports the better of this recipe and
configs/bit_finetune.py.
Cost: B/16 on CIFAR-10 takes about 10,000 steps of 512 images, at 111 GFLOPs for a forward pass of
one image. Not run here.
Expected (Table 5, pre-trained on ImageNet-21k): B/16 98.95 % on CIFAR-10, 91.67 % on CIFAR-100.
vit_jax/paper has all numbers.

The table sweeps the learning rate on a part of the training set. `lr` below is the default of the
released code. `folder`, for your own photographs, is not in the table: it has the recipe of its
small data sets.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.evaluate.vtab import vtab_config
from vit_jax.models.variants import AXIAL_VIT_PREFIX, vit_shape
from vit_jax.recipes import check_data_set

# Table 4. The warm-ups are the released code's; the table has none.
# data: ((source, split, evaluation split), steps, warm-up steps, learning rates of the sweep)
RECIPES = {
  'imagenet': (
    ('tfds:imagenet2012', 'train', 'validation'), 20_000, 500, (0.003, 0.01, 0.03, 0.06)
  ),
  'cifar100': (('tfds:cifar100', 'train', 'test'), 10_000, 500, (0.001, 0.003, 0.01, 0.03)),
  'cifar10':  (('tfds:cifar10', 'train', 'test'), 10_000, 500, (0.001, 0.003, 0.01, 0.03)),
  'pets':     (('tfds:oxford_iiit_pet', 'train', 'test'), 500, 100, (0.001, 0.003, 0.01, 0.03)),
  'flowers':  (
    ('tfds:oxford_flowers102', 'train+validation', 'test'), 500, 100, (0.001, 0.003, 0.01, 0.03)
  ),
  'folder':   (('folder:photos', 'train', ''), 500, 100, (0.001, 0.003, 0.01, 0.03)),
}  # fmt: skip


def get_config(argument: str = 'B/16,cifar10') -> Config:
  """Return the row of Table 4 for 'VARIANT,DATA'. Raises UserError for an unknown data set.

  The learning rate is the largest of the sweep, without the 0.06 that only ImageNet has.
  """
  variant, _, data = argument.partition(',')
  # A ResNet accepts any size. A Transformer needs a multiple of its patch: 378 for patches of 14.
  multiple = vit_shape(variant, prefix=AXIAL_VIT_PREFIX).stride[0] if '/' in variant else 1
  side = 384 // multiple * multiple
  model = ModelConfig(
    variant=variant,
    dtype='bfloat16',
    pool='gap' if variant.startswith(AXIAL_VIT_PREFIX) else 'token',
  )
  if data.startswith('vtab/'):
    return vtab_config(data.removeprefix('vtab/'), model=model, size=(side, side), workers=8)
  known = [*RECIPES, 'vtab/caltech101']
  check_data_set(data, known, recipe='finetune', argument=argument)
  (source, split, eval_split), steps, warmup, rates = RECIPES[data]
  return Config(
    data=DataConfig(
      train=source, split=split, eval_split=eval_split, batch=512, size=(side, side), workers=8
    ),
    model=model,
    optim=OptimConfig(
      name='sgd',
      lr=min(0.03, rates[-1]),
      schedule='cosine',
      warmup=str(warmup),
      b1=0.9,
      momentum_dtype='bfloat16',
      grad_clip_norm=1.0,
    ),
    steps=steps,
    eval_every='10%',
    save_every='10%',
  )


def sweep_rates(argument: str = 'B/16,cifar10') -> tuple[float, ...]:
  """Return the learning rates of Table 4 for 'VARIANT,DATA'. VTAB-1k has none to choose from."""
  data = argument.partition(',')[2]
  return RECIPES[data][-1] if data in RECIPES else ()
