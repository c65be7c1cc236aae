"""Fine-tuning of ResNets by the BiT-HyperRule: "Big Transfer" (arXiv 1912.11370), section 3.3.

    python run_finetune.py --config=configs/bit_finetune.py:BiT-R50x1,cifar10 \\
      --config.init=bit_models/BiT-M-R50x1

Argument: a ResNet and a data set (imagenet, cifar10, cifar100, pets, flowers, folder). The number
of examples sets the steps and mixup; the image size sets the resolution. All tasks share the rest:
SGD with momentum 0.9, batch 512, no weight decay, random crop and flip. The learning rate of 0.003
falls by a factor of 10 at 30, 60 and 90 % of the run. `folder` counts as a small data set of large
images. arXiv 2010.11929 runs the rule for its ResNets too.
Cost: BiT-R50x1 on CIFAR-10 takes 10,000 steps of 512 images of 128 pixels, at 2.5 GFLOPs for a
forward pass of one image. Not run here.
Expected from BiT-M-R50x1: CIFAR-10 97.3 %, CIFAR-100 86.5 %, ImageNet 80.7 % (runs of
google-research/big_transfer).
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.recipes import check_data_set

# data: ((source, split, evaluation split), examples, images have less than 96x96 pixels)
TASKS = {
  'imagenet': (('tfds:imagenet2012', 'train', 'validation'),                1_281_167, False),
  'cifar100': (('tfds:cifar100', 'train', 'test'),                             50_000, True),
  'cifar10':  (('tfds:cifar10', 'train', 'test'),                              50_000, True),
  'pets':     (('tfds:oxford_iiit_pet', 'train', 'test'),                       3_680, False),
  'flowers':  (('tfds:oxford_flowers102', 'train+validation', 'test'),          2_040, False),
  'folder':   (('folder:photos', 'train', ''),                                      0, False),
}  # fmt: skip

# Least number of examples -> (steps, warm-up steps of the released code, mixup).
LENGTHS = {500_000: (20_000, 500, 0.1), 20_000: (10_000, 500, 0.1), 0: (500, 100, 0.0)}
# (side of the resized image, side of the crop). The released code has LARGEST for all large images.
SMALL, LARGE, LARGEST = (160, 128), (448, 384), (512, 480)


def get_config(argument: str = 'BiT-R50x1,cifar10') -> Config:
  """Return the config for 'VARIANT,DATA'. Raises UserError for an unknown data set."""
  variant, _, data = argument.partition(',')
  check_data_set(data, TASKS, recipe='bit_finetune', argument=argument)
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
