"""Data augmentation and regularization: "How to train your ViT" (arXiv 2106.10270).

    python run_pretrain.py --config=configs/augreg.py:S/16,imagenet,medium2
    python run_pretrain.py --config=configs/augreg.py:B/16,imagenet21k,light2,0.03,0.0
    python run_finetune.py --config=configs/augreg.py:B/16,finetune_imagenet \\
      --config.init=augreg/B_16

Argument: MODEL,DATA[,AUG[,DECAY[,DROPOUT]]]. MODEL is Ti/16, S/32, S/16, B/32, B/16, L/16, R+Ti/16,
R26+S/32 or R50+L/32. DATA is imagenet (300 epochs), imagenet21k (300 epochs), imagenet21k_30 (30
epochs), or finetune_DATA for a row of the paper's Table 4. AUG is none, light1, light2, medium1,
medium2, strong1 or strong2; by default what big_vision recommends for the model. DECAY is 0.1 or
0.03, and DROPOUT, which is also the stochastic depth of the last block, is 0.0 or 0.1. These are
the 28 settings that the paper compares for each model and data set.
Adam with a learning rate of 1e-3, batch 4096, cosine decay after 10,000 steps, clipping at 1.
RandAugment has 2 operations; big_vision's code for `light1`, magnitude 0, also changes the image.
Cost: S/16 takes 300 epochs of ImageNet at 9.2 GFLOPs for a forward pass of one image, 10.6
exaFLOPs. Not run here.
Expected top-1 on ImageNet after 300 epochs, for the best of the settings (Table 3, without
fine-tuning): Ti/16 72.59 %, S/16 79.00 %, B/16 79.84 %.

The loss is that of big_vision's first version: the sigmoid loss, whose head starts at -6.9 or, on
ImageNet-21k, at -10. Its present version has the softmax loss on ImageNet.
"""

from vit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.recipes import check_data_set, load_recipe
from vit_jax.settings.fields import with_settings

# AUG: (operations of RandAugment, their magnitude, mixup)
AUGMENTATIONS = {
  'none':    (0,  0.0, 0.0),
  'light1':  (2,  0.0, 0.0),
  'light2':  (2, 10.0, 0.2),
  'medium1': (2, 15.0, 0.2),
  'medium2': (2, 15.0, 0.5),
  'strong1': (2, 20.0, 0.5),
  'strong2': (2, 20.0, 0.8),
}  # fmt: skip

# MODEL: (AUG on ImageNet, AUG on ImageNet-21k), as in big_vision's configs, which have no hybrids:
# these have the settings of the plain model of their size.
MODELS = {
  'Ti/16':    ('light1',  'none'),
  'S/32':     ('light2',  'none'),
  'S/16':     ('medium2', 'light1'),
  'B/32':     ('medium2', 'light2'),
  'B/16':     ('medium2', 'light2'),
  'L/16':     ('medium2', 'medium2'),
  'R+Ti/16':  ('light1',  'none'),
  'R26+S/32': ('light2',  'none'),
  'R50+L/32': ('medium2', 'medium2'),
}  # fmt: skip

# DATA: (source, training split, evaluation split, epochs, bias of the head)
DATA = {
  'imagenet':       ('tfds:imagenet2012', 'train[:99%]', 'validation', 300, -6.9),
  'imagenet21k':    ('folder:imagenet21k', 'train[51200:]', 'train[:25600]', 300, -10.0),
  'imagenet21k_30': ('folder:imagenet21k', 'train[51200:]', 'train[:25600]', 30, -10.0),
}  # fmt: skip

# Table 4: (source, splits, steps and warm-up, learning rates). The longer of two lengths.
RATES = (0.001, 0.003, 0.01, 0.03)
FINETUNING = {
  'finetune_imagenet': (('tfds:imagenet2012', 'train', 'validation'), (20_000, 500), RATES[2:]),
  'finetune_cifar100': (('tfds:cifar100', 'train', 'test'), (10_000, 500), RATES),
  'finetune_resisc45': (
    ('tfds:resisc45', 'train[:60%]', 'train[80%:]'), (10_000, 500), RATES
  ),
  'finetune_pets': (('tfds:oxford_iiit_pet', 'train', 'test'), (2_500, 200), RATES[:3]),
}  # fmt: skip


def get_config(argument: str = 'S/16,imagenet') -> Config:
  """Return the config for 'MODEL,DATA[,AUG[,DECAY[,DROPOUT]]]'. Raises UserError for another."""
  model, data, *rest = [*argument.split(','), '']
  check_choice('model', model, MODELS, argument)
  check_data_set(data, [*DATA, *FINETUNING], recipe='augreg', argument=argument)
  options = [each for each in rest if each]
  if data in FINETUNING:
    if options:
      raise UserError(f'--config=augreg:{argument}: fine-tuning has no augmentation or dropout')
    return finetuning(model, data)
  defaults = [MODELS[model][data != 'imagenet'], '0.1', '0.0']
  augmentation, decay, dropout = options + defaults[len(options) :]
  check_choice('augmentation', augmentation, AUGMENTATIONS, argument)
  check_choice('weight decay', decay, ('0.1', '0.03'), argument)
  check_choice('dropout', dropout, ('0.0', '0.1'), argument)
  return pretraining(model, data, augmentation, float(decay), float(dropout))


def check_choice(what: str, value: str, known, argument: str):
  """Raise UserError unless a part of the argument is one of `known`."""
  if value not in known:
    near = did_you_mean(value, known)
    raise UserError(f'--config=augreg:{argument}: unknown {what} {value!r}.{near}')


def pretraining(model: str, data: str, augmentation: str, decay: float, dropout: float) -> Config:
  """Return the config of one of the 28 settings."""
  source, split, eval_split, epochs, bias = DATA[data]
  operations, magnitude, mixup = AUGMENTATIONS[augmentation]
  large = model in ('L/16', 'R50+L/32')
  return Config(
    data=DataConfig(
      train=source,
      split=split,
      eval_split=eval_split,
      batch=4096,
      size=(224, 224),
      randaug_ops=operations,
      randaug_magnitude=magnitude,
      randaug_variant='big_vision' if operations else 'intended',
      eval_crop='center',
      workers=16,
    ),
    model=ModelConfig(
      variant=model,
      hidden_head=data == 'imagenet',
      head_bias=bias,
      dropout=dropout,
      drop_path=dropout,
      dtype='bfloat16',
      unroll=1 if large else 0,
      remat='vit' if large else 'none',
    ),
    mesh=MeshConfig(fsdp=16 if large else 1),
    optim=OptimConfig(
      name='adamw',
      lr=1e-3,
      schedule='cosine',
      warmup='10000',
      weight_decay=decay,
      weight_decay_mask='.*/kernel',
      grad_clip_norm=1.0,
      momentum_dtype='bfloat16',
    ),
    epochs=float(epochs),
    loss='sigmoid',
    mixup=mixup,
    eval_every='5000',
    save_every='5000',
  )


def finetuning(model: str, data: str) -> Config:
  """Return the config of a row of Table 4, at 384 pixels: that of the first paper but for these."""
  (source, split, eval_split), (steps, warmup), rates = FINETUNING[data]
  settings = {
    'data.train': source,
    'data.split': split,
    'data.eval_split': eval_split,
    'optim.lr': rates[-1],
    'optim.warmup': str(warmup),
    'steps': steps,
  }
  return with_settings(load_recipe(f'finetune:{model},folder'), settings)


def sweep_rates(argument: str = '') -> tuple[float, ...]:
  """Return the learning rates of Table 4 for 'MODEL,finetune_DATA'; pre-training has one."""
  data = argument.partition(',')[2]
  return FINETUNING[data][-1] if data in FINETUNING else ()
