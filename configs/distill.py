"""Distillation: "A good teacher is patient and consistent" (arXiv 2106.05237).

    python run_pretrain.py --config=configs/distill.py:BiT-R152x2,BiT-R50x1,imagenet
    python run_pretrain.py --config=configs/distill.py:BiT-R152x2,BiT-R50x1,flowers,10000
    python run_pretrain.py --config=configs/distill.py:B/8,S/16,imagenet,300
    python run_pretrain.py --config=configs/distill.py:EfficientNet-B7,S/16,imagenet,300

Argument: TEACHER,STUDENT,DATA[,EPOCHS]. TEACHER is BiT-R152x2 (the paper's, one for each data set),
or, for ImageNet, B/8, L/16 or an EfficientNet of Noisy Student. --config.distill.teacher names
another model or a run; set --config.distill.variant to '' or to its variant. STUDENT is a BiT
ResNet or a ViT. DATA is imagenet, flowers, pets, food or sun, and EPOCHS a key of SCHEDULES.
The student sees no labels: it minimizes the divergence from the teacher, for the same crop, flip
and mixture of two images, whose weight is uniform. Adam with a cosine decay, clipping at 1 and
weight decay on kernels. The settings of BiT students are those of big_vision (proj/distill); on
ImageNet they are one set for all lengths. Transformers have its settings for plain ViTs
(plain_vit.py); no result is published for them.
Cost: the teacher's forward pass is added to each step. For an image of 224 pixels a step takes 24
GFLOPs for BiT-R50x1 and 88 for its teacher: 42 exaFLOPs in 300 epochs of ImageNet. Not run here.
Expected top-1 of BiT-R50x1 on ImageNet: 82.8 % after 9,600 epochs at 224 pixels, from a teacher of
83.0 % (README of big_vision's proj/distill); the number of epochs is from memory, unverified.
`vit-jax tables distill` has the runs.
"""

from vit_jax.config import Config, DataConfig, DistillConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.efficientnet_variants import EFFICIENTNET_PREFIX, EFFICIENTNET_SCALES

_BIT_URL = 'https://storage.googleapis.com/bit_models/distill/R152x2_T_{}128.npz'
# data: (source, split, evaluation split, teacher of big_vision)
DATA = {
  'imagenet': ('tfds:imagenet2012', 'train[:98%]', 'validation', 'bit_models/distill/R152x2_T_224'),
  'flowers':  ('tfds:oxford_flowers102', 'train', 'test', _BIT_URL.format('flowers')),
  'pets':     ('tfds:oxford_iiit_pet', 'train[:90%]', 'test', _BIT_URL.format('pet')),
  'food':     ('tfds:food101', 'train[:90%]', 'validation', _BIT_URL.format('food')),
  'sun':      ('tfds:sun397', 'train', 'test', _BIT_URL.format('sun')),
}  # fmt: skip
# (data, epochs): (temperature, learning rate, weight decay without the learning rate). The authors
# chose them on a part of the training data. 1200 epochs are their default for ImageNet.
SCHEDULES = {
  ('imagenet', 1200):    (1.0, 0.03, 3e-4),
  ('imagenet', 300):     (1.0, 0.03, 3e-4),
  ('imagenet', 600):     (1.0, 0.03, 3e-4),
  ('imagenet', 9600):    (1.0, 0.03, 3e-4),
  ('flowers', 100_000):  (1.0, 1e-3, 1e-4),
  ('flowers', 10_000):   (10.0, 3e-3, 3e-4),
  ('flowers', 1_000_000): (1.0, 3e-4, 1e-5),
  ('pets', 3000):        (10.0, 3e-3, 3e-4),
  ('pets', 1000):        (5.0, 0.01, 1e-3),
  ('pets', 30_000):      (2.0, 3e-3, 1e-5),
  ('food', 1000):        (10.0, 1e-3, 3e-4),
  ('food', 100):         (10.0, 0.01, 1e-3),
  ('food', 3000):        (5.0, 0.01, 1e-4),
  ('sun', 1000):         (10.0, 1e-3, 1e-4),
  ('sun', 100):          (10.0, 0.01, 1e-3),
  ('sun', 3000):         (10.0, 0.01, 3e-5),
}  # fmt: skip
BIT_TEACHER = 'BiT-R152x2'
# Teachers for ImageNet alone. The EfficientNets are those of Noisy Student.
VIT_TEACHERS = {
  'B/8': (
    'augreg/B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-'
    'lr_0.03-res_224'
  ),
  'L/16': 'imagenet21k+imagenet2012/ViT-L_16-224',
}
EFFICIENTNETS = tuple(EFFICIENTNET_PREFIX + name for name in EFFICIENTNET_SCALES if name != 'Lite0')


def get_config(argument: str = 'BiT-R152x2,BiT-R50x1,imagenet') -> Config:
  """Return the config for 'TEACHER,STUDENT,DATA[,EPOCHS]'. Raises UserError for another."""
  teacher, student, data, length, *more = [*argument.split(','), '', '', '']
  if data not in DATA:
    near = did_you_mean(data, DATA)
    raise UserError(f'--config=distill:{argument}: expected TEACHER,STUDENT,DATA[,EPOCHS].{near}')
  lengths = [epochs for name, epochs in SCHEDULES if name == data]
  epochs = int(length) if length.isdecimal() else 0 if length else lengths[0]
  if epochs not in lengths or any(more):
    raise UserError(
      f'--config=distill:{argument}: expected TEACHER,STUDENT,{data}[,EPOCHS] with '
      f'{", ".join(map(str, sorted(lengths)))} epochs'
    )
  source, split, eval_split, _ = DATA[data]
  large = data == 'imagenet'
  side = 224 if large else 128
  model, optim, batch = _student(student, *SCHEDULES[data, epochs][1:], large=large)
  return Config(
    data=DataConfig(
      train=source,
      split=split,
      eval_split=eval_split,
      batch=batch,
      size=(side, side),
      eval_crop='center',
      eval_short_side=256 if large else 160,
      workers=16,
    ),
    model=model,
    optim=optim,
    distill=DistillConfig(
      teacher=_find_teacher(teacher, data, argument),
      variant=teacher,
      temperature=SCHEDULES[data, epochs][0],
    ),
    epochs=float(epochs),
    mixup=1.0,
    eval_every='5000',
    save_every='5000',
  )


def _student(
  variant: str, lr: float, decay: float, *, large: bool
) -> tuple[ModelConfig, OptimConfig, int]:
  """Return the settings of model and optimizer, and the batch size."""
  batch, warmup = (4096, 5000) if large else (512, 1500)
  model = ModelConfig(variant=variant, dtype='bfloat16')
  if not variant.startswith('BiT-'):
    lr, decay, batch, warmup = 1e-3, 1e-4, 1024 if large else 512, 10_000 if large else 1500
    model = ModelConfig(variant=variant, pool='gap', position='sincos2d', dtype='bfloat16')
  optim = OptimConfig(
    name='adamw',
    lr=lr,
    schedule='cosine',
    warmup=str(warmup),
    weight_decay=decay / lr,
    weight_decay_mask='.*/kernel',
    grad_clip_norm=1.0,
    momentum_dtype='bfloat16',
  )
  return model, optim, batch


def _find_teacher(name: str, data: str, argument: str) -> str:
  """Return what `load` takes. Raises UserError for an unknown teacher."""
  if name == BIT_TEACHER:
    return DATA[data][-1]
  known = (BIT_TEACHER, *VIT_TEACHERS, *EFFICIENTNETS) if data == 'imagenet' else (BIT_TEACHER,)
  if name not in known:
    raise UserError(
      f'--config=distill:{argument}: no teacher {name!r} for {data}.{did_you_mean(name, known)}'
    )
  if name in VIT_TEACHERS:
    return VIT_TEACHERS[name]
  return f'hf:timm/tf_efficientnet_{name.removeprefix(EFFICIENTNET_PREFIX).lower()}.ns_jft_in1k'
