"""EfficientNets as teachers and students: "Self-training with Noisy Student" (arXiv 1911.04252).

    python run_pretrain.py --config=configs/noisy_student.py:B7
    python -m vit_jax selftrain --teacher configs/noisy_student.py:B7 \\
      --students configs/noisy_student.py:L2,14 configs/noisy_student.py:L2,14 \\
      configs/noisy_student.py:L2,28 --workdir runs/noisy_student
    python -m vit_jax selftrain --teacher configs/noisy_student.py:mini \\
      --students configs/noisy_student.py:mini,3 --workdir runs/mini_student

Argument: a model (B0 … B7, L2, mini) to train on labelled images alone, or MODEL,RATIO for a
student with RATIO unlabelled images for each labelled image. The authors use 14, 14 and 28 for
three generations of L2. With L2 as the teacher they use 1 for B0 and 3 for B1 to B7.
RMSProp with a learning rate of 0.128 for 2,048 labelled images. It falls by 3 % every 2.4 epochs of
350, or every 4.8 epochs of 700. The noise is dropout before the head, stochastic depth, and
RandAugment with the operations of the authors' code (--config.data.randaug_variant=intended
corrects six of them). The moving average of the parameters is evaluated, and teaches. An unlabelled
image is used if the teacher's probability is at least 0.3, and each class has 130,000 of them.
Cost: B0 about 1 exaFLOP, which is 350 epochs of ImageNet at 0.76 GFLOPs for a forward pass. L2 with
its unlabelled images took 12,300 TPUv3-core-days (arXiv 2010.11929, Table 2). Only mini was run
here.
Expected top-1 on ImageNet: 77.1 % for B0 to 84.3 % for B7 (arXiv 1905.11946, without this noise).
As students 78.8 % to 86.9 %, and 88.4 % for L2 (google-research/noisystudent). mini:
results/noisy_student.md.

The 300 million unlabelled images are JFT's, which is not public. Any folder can replace them
(--config.data.unlabelled=images:PATH), but then the numbers are not comparable.
The published weights load under timm's names: set --init, or --teacher, to a directory or file of
tf_efficientnet_b0.ns_jft_in1k.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.efficientnet_variants import EFFICIENTNET_PREFIX, EFFICIENTNET_SCALES

# From the scripts of google-research/noisystudent.
# model: (RandAugment's magnitude, factor of a student's 350 epochs)
RECIPES = {
  'B0': (0, 2), 'B1': (0, 2), 'B2': (6, 2), 'B3': (12, 2), 'B4': (15, 2), 'B5': (18, 1),
  'B6': (24, 1), 'B7': (27, 1), 'L2': (27, 1),
}  # fmt: skip


def get_config(argument: str = 'B0') -> Config:
  """Return the config for 'MODEL', or for the student 'MODEL,RATIO'. Raises UserError otherwise."""
  model, _, ratio = argument.partition(',')
  if model not in (*RECIPES, 'mini') or (ratio and not (ratio.isdecimal() and int(ratio))):
    known = did_you_mean(model, (*RECIPES, 'mini'))
    raise UserError(
      f'configs/noisy_student.py:{argument}: expected MODEL, or MODEL,RATIO such as L2,14.{known}'
    )
  return mini(int(ratio or 0)) if model == 'mini' else published(model, int(ratio or 0))


def published(model: str, ratio: int) -> Config:
  """Return the config for ImageNet, with images of JFT-300M if `ratio` is not 0."""
  _, _, side, dropout = EFFICIENTNET_SCALES[model]
  magnitude, epochs_factor = RECIPES[model]
  epochs_factor = epochs_factor if ratio else 1
  return Config(
    data=DataConfig(
      train='tfds:imagenet2012',
      eval_split='validation',
      **unlabelled('images:jft', ratio),
      batch=2048 * (1 + ratio),
      size=(side, side),
      crop_area=(0.08, 1.0),
      randaug_ops=2 if magnitude else 0,
      randaug_magnitude=float(magnitude),
      randaug_variant='noisystudent' if magnitude else 'intended',
      eval_crop='center',
      eval_short_side=round(side / 0.875),
      workers=16,
    ),
    model=ModelConfig(
      variant=EFFICIENTNET_PREFIX + model,
      dropout=dropout,
      drop_path=0.2,
      dtype='bfloat16',
      mean=(123.675, 116.28, 103.53),
      scale=(58.395, 57.12, 57.375),
    ),
    optim=OptimConfig(
      name='rmsprop',
      lr=0.128,
      schedule='staircase',
      lr_boundary_every=f'{2.4 * epochs_factor:g}ep',
      lr_boundary_factor=0.97,
      warmup='5ep',
      b1=0.9,
      b2=0.9,
      weight_decay=1e-5,
      weight_decay_mask='.*/kernel',
      coupled_weight_decay=True,
      ema=0.9999,
    ),
    epochs=350 * epochs_factor,
    label_smoothing=0.1,
    eval_every='5ep',
    save_every='5ep',
  )


def unlabelled(source: str, ratio: int) -> dict[str, object]:
  """Return the settings of a student's unlabelled images, or none if `ratio` is 0."""
  if not ratio:
    return {}
  return {
    'unlabelled': source,
    'unlabelled_ratio': ratio,
    'confidence_threshold': 0.3,
    'unlabelled_per_class': 130_000,
  }


def mini(ratio: int) -> Config:
  """Return the config of a small ResNet on Fashion-MNIST, of which 10 % have labels."""
  student = {}
  if ratio:
    student = unlabelled('builtin:fashion_mnist', ratio)
    student |= {'unlabelled_split': 'train[10%:]', 'unlabelled_per_class': 3000}
    student |= {'randaug_ops': 1, 'randaug_magnitude': 3.0}
  return Config(
    data=DataConfig(
      train='builtin:fashion_mnist',
      split='train[:10%]',
      **student,
      batch=96,
      eval_batch=500,
      size=(28, 28),
      crop='resize',
    ),
    model=ModelConfig(variant='R1.1x1', stem_width=32),
    optim=OptimConfig(
      name='adamw', lr=8e-3, schedule='cosine', warmup='5%', weight_decay=0.1, grad_clip_norm=1.0
    ),
    steps=600 if ratio else 400,
    log_every='100',
    eval_every='0',
    save_every='50%',
  )
