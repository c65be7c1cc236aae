"""EfficientNets as teachers and noised students: "Self-training with Noisy Student" (arXiv 1911.04252).

    python run_pretrain.py --config=configs/noisy_student.py:B7
    python -m vit_jax selftrain --teacher configs/noisy_student.py:B7 --workdir runs/noisy_student \\
      --students configs/noisy_student.py:L2,14 configs/noisy_student.py:L2,14 configs/noisy_student.py:L2,28
    python -m vit_jax selftrain --teacher configs/noisy_student.py:mini --students configs/noisy_student.py:mini,3 \\
      --workdir runs/mini_student

Argument: a model (B0 … B7, L2; mini) for labelled images alone; for a student MODEL,RATIO: so many unlabelled images for each
labelled one. The authors' are 14, 14 and 28 for three generations of L2, 1 for B0 and 3 for B1 to B7, with L2 as their teacher.
RMSProp, a rate of 0.128 for 2,048 labelled images that falls by 3 % every 2.4 epochs of 350, or every 4.8 of 700; the noise is
RandAugment, dropout before the head and stochastic depth; the moving average is what is evaluated, and what teaches. Of the
unlabelled images those count of which the teacher is sure by 0.3, 130,000 of each class.
Cost: B0 about 1 exaFLOP, 350 epochs of ImageNet at 0.76 GFLOPs a forward pass; L2 with its unlabelled images took 12,300
TPUv3-core-days (arXiv 2010.11929, Table 2). Not run here, but for mini.
Expected: ImageNet top-1 of B0 77.1 % to B7 84.3 % (arXiv 1905.11946, without this noise). As students 78.8 % to 86.9 %, and
88.4 % for L2 (google-research/noisystudent). Not reproducible outside Google: their 300 million unlabelled images are JFT's;
any folder takes their place (--config.data.unlabelled=images:PATH). Of mini: results/noisy_student.md.

The published weights load by timm's names: --init (or --teacher) on a directory or file of tf_efficientnet_b0.ns_jft_in1k.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.efficientnet_variants import EFFICIENTNET_PREFIX, EFFICIENTNET_SCALES

# The scripts of google-research/noisystudent. RandAugment's magnitude; how often a student's 350 epochs are gone through.
RECIPES = {
  'B0': (0, 2), 'B1': (0, 2), 'B2': (6, 2), 'B3': (12, 2), 'B4': (15, 2), 'B5': (18, 1), 'B6': (24, 1), 'B7': (27, 1),
  'L2': (27, 1),
}  # fmt: skip


def get_config(argument: str = 'B0') -> Config:
  """The recipe for 'MODEL' at its published size, or for the student 'MODEL,RATIO'. UserError for anything else."""
  model, _, ratio = argument.partition(',')
  if model not in (*RECIPES, 'mini') or (ratio and not (ratio.isdecimal() and int(ratio))):
    known = did_you_mean(model, (*RECIPES, 'mini'))
    raise UserError(
      f'configs/noisy_student.py:{argument}: expected MODEL, or MODEL,RATIO such as L2,14.{known}'
    )
  return mini(int(ratio or 0)) if model == 'mini' else published(model, int(ratio or 0))


def published(model: str, ratio: int) -> Config:
  """On ImageNet, and on JFT-300M's images where there is a ratio."""
  _, _, side, dropout = EFFICIENTNET_SCALES[model]
  magnitude, longer = RECIPES[model]
  longer = longer if ratio else 1
  return Config(
    data=DataConfig(
      train='tfds:imagenet2012', eval_split='validation', **unlabelled('images:jft', ratio), batch=2048 * (1 + ratio),
      size=(side, side), crop_area=(0.08, 1.0), randaug_ops=2 if magnitude else 0, randaug_magnitude=float(magnitude),
      eval_crop='center', eval_short_side=round(side / 0.875), workers=16,
    ),
    model=ModelConfig(
      variant=EFFICIENTNET_PREFIX + model, dropout=dropout, drop_path=0.2, dtype='bfloat16',
      mean=(123.675, 116.28, 103.53), scale=(58.395, 57.12, 57.375),
    ),
    optim=OptimConfig(
      name='rmsprop', lr=0.128, schedule='staircase', lr_boundary_every=f'{2.4 * longer:g}ep', lr_boundary_factor=0.97, warmup='5ep', b1=0.9, b2=0.9,
      weight_decay=1e-5, weight_decay_mask='.*/kernel', coupled_weight_decay=True, ema=0.9999,
    ),
    epochs=350 * longer,
    label_smoothing=0.1,
    eval_every='5ep',
    save_every='5ep',
  )  # fmt: skip


def unlabelled(source: str, ratio: int) -> dict[str, object]:
  """What a student's data has besides the labelled images."""
  return (
    {
      'unlabelled': source,
      'unlabelled_ratio': ratio,
      'confidence_threshold': 0.3,
      'unlabelled_per_class': 130_000,
    }
    if ratio
    else {}
  )


def mini(ratio: int) -> Config:
  """A tenth of Fashion-MNIST with labels, and the rest without: a small ResNet, and one of the same size as its student."""
  others = (
    unlabelled('builtin:fashion_mnist', ratio)
    | {'unlabelled_split': 'train[10%:]', 'unlabelled_per_class': 3000}
    if ratio
    else {}
  )
  noise = {'randaug_ops': 1, 'randaug_magnitude': 3.0} if ratio else {}
  return Config(
    data=DataConfig(
      train='builtin:fashion_mnist',
      split='train[:10%]',
      **others,
      batch=96,
      eval_batch=500,
      size=(28, 28),
      crop='resize',
      **noise,
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
