"""Fine-tuning by the BiT-HyperRule: "Big Transfer" (arXiv 1912.11370), §3.3, which arXiv 2010.11929 runs for its ResNets too.

    python run_finetune.py --config=configs/bit_finetune.py:BiT-R50x1,cifar10 --config.init=bit_models/BiT-M-R50x1

Argument: a ResNet and a data set (imagenet, cifar10, cifar100, pets, flowers, folder). What varies with a task is only what its
size says: steps and mixup its examples, the resolution its pixels. Everything else is the same: SGD with momentum 0.9, batch
512, a rate of 0.003 that falls to a tenth at 30, 60 and 90 % of the run, no weight decay, random crop and flip.
Cost: BiT-R50x1 on CIFAR-10 10,000 steps of 512 images of 128 pixels, 2.5 GFLOPs a forward pass. Not run here.
Expected, from BiT-M-R50x1: CIFAR-10 97.3 %, CIFAR-100 86.5 %, ImageNet 80.7 % (google-research/big_transfer's own runs of it).

`folder` is taken to be a small data set of large images.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean

# data:       source, split, evaluation split                                    examples  less than 96x96 pixels
TASKS = {
  'imagenet': (('tfds:imagenet2012', 'train', 'validation'),                    1_281_167, False),
  'cifar100': (('tfds:cifar100', 'train', 'test'),                                 50_000, True),
  'cifar10':  (('tfds:cifar10', 'train', 'test'),                                  50_000, True),
  'pets':     (('tfds:oxford_iiit_pet', 'train', 'test'),                           3_680, False),
  'flowers':  (('tfds:oxford_flowers102', 'train+validation', 'test'),              2_040, False),
  'folder':   (('folder:photos', 'train', ''),                                          0, False),
}  # fmt: skip

# From so many examples on: steps, warm-up (of the released code), mixup.
LENGTHS = {500_000: (20_000, 500, 0.1), 20_000: (10_000, 500, 0.1), 0: (500, 100, 0.0)}
# The side that images are resized to, and that of the crop. The released code takes (512, 480) for all that are not small.
SMALL, LARGE, LARGEST = (160, 128), (448, 384), (512, 480)


def get_config(argument: str = 'BiT-R50x1,cifar10') -> Config:
  """The rule for the task that 'VARIANT,DATA' names. UserError for one that it does not know."""
  variant, _, data = argument.partition(',')
  if data not in TASKS:
    raise UserError(
      f'configs/bit_finetune.py:{argument}: there is no task {data!r}.{did_you_mean(data, TASKS)}'
    )
  (source, split, eval_split), examples, small = TASKS[data]
  steps, warmup, mixup = next(row for least, row in LENGTHS.items() if examples >= least)
  side, crop = SMALL if small else LARGEST if variant.endswith('R152x4') else LARGE
  return Config(
    data=DataConfig(
      train=source,
      split=split,
      eval_split=eval_split,
      batch=512,
      size=(crop, crop),
      crop='random',
      resize_before_crop=side,
      workers=8,
    ),
    model=ModelConfig(variant=variant, dtype='bfloat16'),
    optim=OptimConfig(
      name='sgd', lr=0.003, schedule='staircase', lr_boundaries='30%,60%,90%', warmup=str(warmup)
    ),
    steps=steps,
    mixup=mixup,
    eval_every='10%',
    save_every='10%',
  )
