"""EfficientNets with Noisy Student's noise, on labelled images alone: "Self-training with Noisy Student" (arXiv 1911.04252).

    python run_pretrain.py --config=configs/efficientnet.py:B0

Argument: a model (B0 … B7, L2). RMSProp, a rate of 0.128 for 2,048 images that falls by 3 % every 2.4 epochs, 350 epochs; the
noise is RandAugment, dropout before the head and stochastic depth; the moving average is what is evaluated.
Cost: B0 about 1 exaFLOP, 350 epochs of ImageNet at 0.76 GFLOPs a forward pass; L2 with its unlabelled images took 12,300
TPUv3-core-days (arXiv 2010.11929, Table 2). Not run here.
Expected: ImageNet top-1 of B0 77.1 % to B7 84.3 % (arXiv 1905.11946, without this noise). With 300 million unlabelled images
78.8 % to 86.9 %, L2 88.4 % (google-research/noisystudent).

The published weights load by timm's names: --init on a directory or file of tf_efficientnet_b0.ns_jft_in1k.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.efficientnet_variants import PREFIX, SCALES

# RandAugment's magnitude: the scripts of google-research/noisystudent, which have none for B0 and B1: theirs are B2's here.
MAGNITUDES = {'B0': 6, 'B1': 6, 'B2': 6, 'B3': 12, 'B4': 15, 'B5': 18, 'B6': 24, 'B7': 27, 'L2': 27}


def get_config(argument: str = 'B0') -> Config:
  """The recipe for that model at its published size. UserError for another name."""
  if argument not in MAGNITUDES:
    raise UserError(f'configs/efficientnet.py:{argument}: there is no such model.{did_you_mean(argument, MAGNITUDES)}')
  _, _, side, dropout = SCALES[argument]
  return Config(
    data=DataConfig(
      train='tfds:imagenet2012', eval_split='validation', batch=2048, size=(side, side), crop_area=(0.08, 1.0),
      operations=2, magnitude=float(MAGNITUDES[argument]), eval_crop='center', eval_short_side=round(side / 0.875), workers=16,
    ),
    model=ModelConfig(
      variant=PREFIX + argument, dropout=dropout, drop_path=0.2, dtype='bfloat16',
      mean=(123.675, 116.28, 103.53), scale=(58.395, 57.12, 57.375),
    ),
    optim=OptimConfig(
      name='rmsprop', lr=0.128, schedule='staircase', drop_every='2.4ep', drop=0.97, warmup='5ep', b1=0.9, b2=0.9,
      weight_decay=1e-5, decay='.*/kernel', couple_decay=True, ema=0.9999,
    ),
    epochs=350,
    label_smoothing=0.1,
    eval_every='5ep',
    save_every='5ep',
  )  # fmt: skip
