"""What a run is: every setting, its type, its default and its unit.

Nothing here touches a device or reads data. `validate` says in one line what is wrong with a config;
`total_steps` and `parse_duration` turn what a person writes ('2ep', '10%') into steps once the size of the data is known.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field

from vit_jax.config_checks import CHOICES, RANGES, format_type, has_type, setting_types
from vit_jax.errors import UserError, did_you_mean


@dataclass(slots=True, kw_only=True)
class DataConfig:
  """Which examples, and how a record becomes an image. Batch `k` is a pure function of this, the seed and `k`."""

  train: str = 'builtin:fashion_mnist'  # A source: builtin:NAME, folder:PATH, csv:PATH, tfds:NAME or vtab:TASK.
  split: str = (
    'train'  # TFDS's split syntax, for every kind of source: 'train[:98%]', 'train+validation'.
  )
  eval: str = ''  # The source to evaluate on; '' means the training source.
  eval_split: str = (
    ''  # '' means the source's held-out split: the first of test, validation and val that it has.
  )
  dir: str = ''  # Where TFDS data sets lie; '' means $TFDS_DATA_DIR, or TFDS's own default.
  unlabelled: str = (
    ''  # A source that a teacher labels, mixed into every batch, or images:PATH; '' means none.
  )
  unlabelled_split: str = 'train'
  unlabelled_ratio: int = 1  # Of a batch's images, how many are unlabelled for each labelled one.
  pseudo_labels: str = (
    ''  # What the teacher said of them: a directory that `python -m vit_jax selftrain` makes.
  )
  confidence_threshold: float = (
    0.3  # Of the teacher in its best class; an image of which it is less sure is left out.
  )
  unlabelled_per_class: int = (
    130_000  # Images of each best class: the surest of them, or some twice and more.
  )
  batch: int = 256  # Images in a step, over all hosts, labelled and unlabelled.
  eval_batch: int = 0  # Images in an evaluation step, over all hosts; 0 means `batch`.
  size: tuple[int, int] = (224, 224)  # Height and width in pixels; one number means a square.
  crop: str = 'inception'  # inception (a random box, resized), resize (the whole), random (a part, after resizing to `crop_from`).
  crop_area: tuple[float, float] = (0.05, 1.0)  # Of the image's area, for the inception crop.
  crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # Width over height, for the inception crop.
  resize_before_crop: int = 0  # For the random crop: the side in pixels of the square that the whole image is resized to first.
  randaug_ops: int = (
    0  # Of RandAugment (data/randaugment.py), one after another, on every training image.
  )
  randaug_magnitude: float = 0.0  # Theirs: 27 is that of Noisy Student's largest.
  flip: bool = True  # Left-right, for every second training image.
  eval_crop: str = 'resize'  # resize (the whole image to the size), center (resize the short side, cut the middle).
  eval_short_side: int = 256  # For 'center': the short side that the image is resized to first.
  bad_images: str = 'error'  # error, or skip: an unreadable image counts in no loss and no accuracy, and is counted.
  max_bad_fraction: float = (
    0.001  # The share of the examples that may be skipped, rounded up; more of them end the run.
  )
  max_pixels: int = 100_000_000  # An image that claims more is bad: a decompression bomb.
  workers: int = 0  # Processes that make batches; 0 makes them in threads of this one.
  threads: int = (
    0  # Threads that decode, in each process; 0 means the cores shared out, and one more.
  )
  prefetch: int = 2  # Batches that wait on the device.


@dataclass(slots=True, kw_only=True)
class ModelConfig:
  """Which Vision Transformer. `variant` gives the shape; a number that is not 0 below it replaces one of its numbers."""

  variant: str = 'B/16'  # A row of models/variants.py and the side of a patch in pixels.
  width: int = 0
  depth: int = 0
  mlp: int = 0
  heads: int = 0
  stem_width: int = 64  # Channels of the first convolution of a hybrid such as R50+B/16.
  pool: str = 'token'  # What the head reads: token (a class token), gap (the mean of the patches), map (attention pooling).
  hidden_head: bool = (
    False  # A tanh layer of the model's width before the head: the paper's pre-training head.
  )
  head_bias: float = (
    0.0  # Where the bias of a new head starts: -10 with the sigmoid loss and many classes.
  )
  position: str = (
    'learned'  # learned, learned2d (columns and rows), relative (in the scores), sincos2d, none.
  )
  position_at: str = 'stem'  # Where learned ones are added: stem, every (each block its own), shared (each block the same).
  registers: int = 0  # Learned tokens that take part in attention and are dropped at the end.
  patch_norm: bool = False  # LayerNorm before and after the patch projection ("dual patch norm").
  attention: str = (
    'auto'  # auto (the devices' own kernel), xla, pallas (ours for TPU), cudnn (NVIDIA's).
  )
  dropout: float = 0.0
  drop_path: float = (
    0.0  # Stochastic depth: the rate of the last block; it grows linearly from 0 at the first.
  )
  gelu: str = 'tanh'  # tanh (the originals), erf.
  norm_eps: float = 1e-6
  mean: tuple[float, float, float] = (
    127.5,
    127.5,
    127.5,
  )  # Of a uint8 channel: the model sees (image - mean) / scale.
  scale: tuple[float, float, float] = (127.5, 127.5, 127.5)
  dtype: str = 'float32'  # Of the computation: float32, bfloat16. Parameters are float32.
  remat: str = 'none'  # What the backward pass computes again: none, vit (norms, GELU, softmax), dots (all but products), full.
  unroll: int = 1  # Blocks a turn of the loop over depth; 0 means all. Changes the program, never the parameters.


@dataclass(slots=True, kw_only=True)
class OptimConfig:
  """The recipe, in the paper's words; optim.py makes it optax."""

  name: str = 'adamw'  # adamw, sgd, adafactor, rmsprop.
  lr: float = 1e-3
  schedule: str = 'cosine'  # cosine, linear, rsqrt, constant, staircase.
  warmup: str = '0'  # A duration: '500' steps, '5ep' epochs, '10%' of the run.
  cooldown: str = '0'  # A duration: the last part falls linearly to `lr_end`.
  lr_end: float = 0.0  # Where the decay ends.
  rsqrt_timescale: int = 10_000  # In steps.
  lr_boundaries: str = (
    ''  # Durations from the start of the run after which a staircase falls: '30%,60%,90%' …
  )
  lr_boundary_every: str = '0'  # … or one duration, after every multiple of which it does.
  lr_boundary_factor: float = 0.1  # What it is multiplied with, each time.
  b1: float = 0.9  # Adam's, and the momentum of SGD, RMSProp and Adafactor.
  b2: float = 0.999  # Adam's, and RMSProp's decay.
  momentum_dtype: str = 'float32'  # Of the first moment: float32, bfloat16.
  weight_decay: float = (
    0.0  # Decoupled, times the learning rate (optax.adamw's and the paper's unit).
  )
  coupled_weight_decay: bool = (
    False  # Weight decay goes into the gradient, through the momentum: the L2 of SGD and RMSProp.
  )
  head_weight_decay_factor: float = (
    1.0  # Times the weight decay, for the kernel of the head (arXiv 2106.04560: 100).
  )
  weight_decay_mask: str = (
    '.*'  # The parameters that decay: a regular expression that matches the whole path.
  )
  grad_clip_norm: float = 0.0  # The global norm that gradients are clipped to; 0 means no clipping.
  freeze: str = (
    ''  # The parameters that stay as they are: a regular expression that matches the whole path.
  )
  layer_decay: float = 1.0  # Learning rates fall by this factor with each block away from the head.
  ema: float = 0.0  # Polyak averaging: the decay of a moving average of the parameters, which is then what is evaluated.
  norm_momentum: float = 0.99  # Of the running statistics of batch norm, where a model has them.
  grad_dtype: str = (
    'float32'  # In which gradients are summed over the devices: float32, bfloat16 (half the bytes).
  )
  grad_accum_steps: int = 1  # Parts that a batch is computed in, one after another.
  skip_spikes: float = 0.0  # Leave out a step whose loss or gradient norm is so many deviations over those before; 0 means none.
  spike_window: int = 128  # Steps that mean and deviation are over.
  max_bad_steps: int = 10  # So many in a row that are left out, not finite or spikes, end the run.


@dataclass(slots=True, kw_only=True)
class MaskConfig:
  """Learning without labels, what patches that the model cannot see look like (arXiv 2010.11929, App. B.1.2)."""

  target: str = ''  # colour (a patch's mean, 3 bits a channel), grid (4x4 such colours), pixels; '' learns the labels instead.
  rate: float = 0.5  # The share of an image's patches that are corrupted, and told of.


@dataclass(slots=True, kw_only=True)
class MeshConfig:
  """How the devices are laid out: the axis `data` takes all that `fsdp` leaves."""

  fsdp: int = 1  # Devices that share one copy of the parameters.


@dataclass(slots=True, kw_only=True)
class Config:
  """A run."""

  data: DataConfig = field(default_factory=DataConfig)
  model: ModelConfig = field(default_factory=ModelConfig)
  optim: OptimConfig = field(default_factory=OptimConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  mask: MaskConfig = field(default_factory=MaskConfig)
  steps: int = 0  # Exactly one of steps and epochs is not 0.
  epochs: float = 0.0
  seed: int = 0
  loss: str = 'softmax'  # softmax, sigmoid (summed over the classes).
  label_smoothing: float = 0.0
  mixup: float = 0.0  # The Beta distribution's parameter; 0 means none.
  init: str = (
    ''  # Where the parameters start: whatever `vit_jax.load` takes; '' means from scratch.
  )
  init_positions: str = 'corner'  # How position embeddings come to another grid: corner (the paper), half_pixel, bicubic.
  log_ids: bool = (
    False  # Write which examples each step was made of, and its loss to the bit, to ids.jsonl.
  )
  log_every: str = '50'  # A duration, as the others below.
  eval_every: str = '1ep'
  probes: tuple[
    str, ...
  ] = ()  # More to evaluate, each PROTOCOL:SOURCE (evaluate/protocols.py): 'fewshot:builtin:digits'.
  probe_every: str = '0'  # A duration; 0 means after the last step alone.
  fewshot_l2: float = 1024.0  # How much few-shot regression holds its weights down; big_vision's, the paper does not say.
  save_every: str = '1ep'
  max_to_keep: int = 2  # Checkpoints kept, the newest.
  keep_every: str = '0'  # A duration: checkpoints at its multiples are kept for good; 0 means none.
  first_step_timeout: float = 2400.0  # Seconds until the first step, or for a checkpoint, after which a run is stuck; 0: none.
  step_timeout: float = (
    600.0  # Seconds for a step, after which a run is stuck and shows where it is; 0: none.
  )


# Names that settings had before: a run directory written then is read by its new names.
RENAMED_SETTINGS = {
  'keep': 'max_to_keep',
  'optim.clip': 'optim.grad_clip_norm',
  'optim.accumulate': 'optim.grad_accum_steps',
  'optim.drop_at': 'optim.lr_boundaries',
  'optim.drop': 'optim.lr_boundary_factor',
  'optim.frozen': 'optim.freeze',
  'evals_every': 'probe_every',
  'evals': 'probes',
  'optim.drop_every': 'optim.lr_boundary_every',
  'optim.couple_decay': 'optim.coupled_weight_decay',
  'optim.decay': 'optim.weight_decay_mask',
  'optim.head_decay': 'optim.head_weight_decay_factor',
  'data.per_class': 'data.unlabelled_per_class',
  'data.confidence': 'data.confidence_threshold',
  'data.bad_budget': 'data.max_bad_fraction',
  'data.operations': 'data.randaug_ops',
  'data.magnitude': 'data.randaug_magnitude',
  'data.crop_from': 'data.resize_before_crop',
}


def config_to_dict(config) -> dict:
  """The config as plain nested dicts: what config.json holds."""
  return dataclasses.asdict(config)


def flatten_config(config, prefix: str = '') -> dict[str, object]:
  """{'data.batch': 256, …}: every setting by the name that its flag has after `--config.`."""
  out = {}
  for f in dataclasses.fields(config):
    value = getattr(config, f.name)
    out |= (
      flatten_config(value, f'{prefix}{f.name}.')
      if dataclasses.is_dataclass(value)
      else {prefix + f.name: value}
    )
  return out


def config_from_dict(values: dict, cls=Config):
  """The inverse of `config_to_dict`. UserError for a name that `cls` does not have."""
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if not isinstance(values, dict):
    raise UserError(f'a config is a table of settings, not {values!r:.80}')
  for name in values:
    if name not in fields:
      raise UserError(f'config field {name!r} is unknown.{did_you_mean(name, fields)}')
  nested = lambda f: dataclasses.is_dataclass(f.type)
  made = lambda f, v: (
    config_from_dict(v, f.type) if nested(f) else tuple(v) if isinstance(v, list) else v
  )
  return cls(**{name: made(fields[name], value) for name, value in values.items()})


def rename_settings(values: dict) -> dict:
  """Return a copy of a config as nested dicts in which the settings of `RENAMED_SETTINGS` have their new names."""
  values = {
    name: dict(value) if isinstance(value, dict) else value for name, value in values.items()
  }
  for old, new in RENAMED_SETTINGS.items():
    group, _, name = old.rpartition('.')
    table = values.get(group) if group else values
    if isinstance(table, dict) and name in table:
      table[new.rpartition('.')[2]] = table.pop(name)
  return values


def validate(config: Config) -> Config:
  """The config with sizes spelled out, or a UserError that names the field, its value and what it may be."""
  size = config.data.size
  size = (size,) if type(size) is int else tuple(size) if isinstance(size, list) else size
  size = size * 2 if isinstance(size, tuple) and len(size) == 1 else size
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, size=size))
  types = setting_types(Config)
  for name, value in flatten_config(config).items():
    if not has_type(types[name], value):
      raise UserError(f'config.{name}={value!r:.80}: expected {format_type(types[name])}')
    if name in CHOICES and value not in CHOICES[name]:
      raise UserError(f'config.{name}={value!r}.{did_you_mean(str(value), CHOICES[name])}')
    if name in RANGES and not (RANGES[name][0] <= value <= RANGES[name][1] and value < math.inf):
      low, high = RANGES[name]
      raise UserError(f'config.{name}={value}: expected a number from {low} to {high}')
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
      raise UserError(f'config.{name}={value}: expected finite numbers')
  if not config.mask.target and config.mask != MaskConfig():
    raise UserError(
      f'config.mask.rate={config.mask.rate:g}: no patches are masked; set config.mask.target too'
    )
  _check_combinations(config)
  return config


def _check_combinations(config: Config):
  """What no field can tell by itself."""
  data, optim = config.data, config.optim
  if min(data.size) < 1:
    raise UserError(
      f'config.data.size={data.size}: expected HEIGHT,WIDTH in pixels, or one number for a square'
    )
  if bool(config.steps) == bool(config.epochs):
    got = f'steps={config.steps} and epochs={config.epochs:g}'
    raise UserError(
      f'{got}: set exactly one of them (--config.steps=0 or --config.epochs=0 unsets the other)'
    )
  if data.unlabelled and data.batch % (1 + data.unlabelled_ratio):
    raise UserError(
      f'config.data.batch={data.batch} does not divide into groups of 1 labelled image and '
      f'config.data.unlabelled_ratio={data.unlabelled_ratio} unlabelled ones'
    )
  for name, value in UNLABELLED_DEFAULTS.items():
    if not data.unlabelled and getattr(data, name) != value:
      raise UserError(
        f'config.data.{name}={getattr(data, name)!r} is of no images: config.data.unlabelled names none'
      )
  if data.batch % optim.grad_accum_steps:
    raise UserError(
      f'config.data.batch={data.batch} does not divide into config.optim.grad_accum_steps={optim.grad_accum_steps} parts'
    )
  if not 0 < data.crop_area[0] <= data.crop_area[1] <= 1:
    raise UserError(f'config.data.crop_area={data.crop_area}: expected 0 < LOW <= HIGH <= 1')
  if not 0 < data.crop_aspect[0] <= data.crop_aspect[1]:
    raise UserError(f'config.data.crop_aspect={data.crop_aspect}: expected 0 < LOW <= HIGH')
  if data.crop == 'random' and data.resize_before_crop < max(data.size):
    raise UserError(
      f'config.data.resize_before_crop={data.resize_before_crop} is less than the size {data.size} that is cut from it'
    )
  if data.crop != 'random' and data.resize_before_crop:
    raise UserError(
      f"config.data.resize_before_crop={data.resize_before_crop}: only config.data.crop='random' resizes first"
    )
  if bool(data.randaug_ops) != bool(data.randaug_magnitude):
    raise UserError(
      f'config.data.randaug_ops={data.randaug_ops} with randaug_magnitude={data.randaug_magnitude:g}: one needs the other'
    )
  if data.eval_crop == 'center' and data.eval_short_side < max(data.size):
    raise UserError(
      f'config.data.eval_short_side={data.eval_short_side} is less than the size {data.size} that is cut from it'
    )
  if (optim.schedule == 'staircase') != bool(optim.lr_boundaries or optim.lr_boundary_every != '0'):
    raise UserError(
      f'config.optim.schedule={optim.schedule!r} with lr_boundaries={optim.lr_boundaries!r} and lr_boundary_every={optim.lr_boundary_every!r}: '
      'a staircase, and nothing else, needs one of them'
    )
  if min(config.model.scale) <= 0:
    raise UserError(f'config.model.scale={config.model.scale}: expected three positive numbers')
  for name in ('weight_decay_mask', 'freeze'):
    try:
      re.compile(getattr(optim, name))
    except re.error as error:
      raise UserError(
        f'config.optim.{name}={getattr(optim, name)!r} is not a regular expression: {error}'
      ) from None


def parse_duration(text: str, *, name: str, steps: int, epoch: float) -> int:
  """Steps in '500' (steps), '2ep' (epochs of `epoch` steps) or '10%' (of the run's `steps`); at least 1, or 0 for '0'."""
  match = re.fullmatch(r'(\d+(?:\.\d+)?)(ep|%|)', str(text).strip())
  if not match or (not match[2] and '.' in match[1]):
    raise UserError(
      f"config.{name}={text!r}: expected a duration such as '500' (steps), '2ep' (epochs) or '10%' (of the run)"
    )
  count = float(match[1]) * {'': 1, 'ep': epoch, '%': steps / 100}[match[2]]
  return max(1, round(count)) if count else 0


def due(step: int, every: int, last: int) -> bool:
  """Whether something that happens every so many steps, and after the last, happens after `step`. 0 means only the last."""
  return step == last or (every > 0 and step % every == 0)


# What a run without unlabelled images has of the settings about them.
UNLABELLED_DEFAULTS = {
  name: getattr(DataConfig(), name)
  for name in (
    'unlabelled',
    'unlabelled_split',
    'unlabelled_ratio',
    'pseudo_labels',
    'confidence_threshold',
    'unlabelled_per_class',
  )
}


def labelled_batch_size(data: DataConfig) -> int:
  """Images of a batch that have labels of their own: an epoch is once through these."""
  return data.batch // (1 + data.unlabelled_ratio) if data.unlabelled else data.batch


def total_steps(config: Config, examples: int) -> int:
  """Steps of the run over `examples` labelled ones. UserError where the batch or the warm-up doesn't fit."""
  if labelled_batch_size(config.data) > examples:
    part = f', with {labelled_batch_size(config.data)} labelled,' if config.data.unlabelled else ''
    raise UserError(
      f'config.data.batch={config.data.batch}{part} is more than the {examples} training examples of {config.data.train}'
    )
  epoch = examples / labelled_batch_size(config.data)
  steps = config.steps or max(1, round(config.epochs * epoch))
  ramps = {
    name: parse_duration(
      getattr(config.optim, name), name=f'optim.{name}', steps=steps, epoch=epoch
    )
    for name in ('warmup', 'cooldown')
  }
  if sum(ramps.values()) >= steps:
    raise UserError(
      f'warmup ({ramps["warmup"]}) and cooldown ({ramps["cooldown"]}) leave nothing of {steps} steps'
    )
  return steps
