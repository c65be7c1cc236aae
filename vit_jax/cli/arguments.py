"""Arguments that several commands share: the model and its overrides, the batch size, the hosts."""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.settings.limits import CHOICES

_MAX_EVAL_BATCH_PER_DEVICE = 256
_COMMA_FLAGS = ('--mean', '--std', '--size')  # Their values are one word, such as 0.5,0.5,0.5.
SOURCE_KINDS = (
  'builtin:NAME, folder:PATH, csv:PATH, tfds:NAME, records:PATH, tar:PATH, parquet:PATH'
)


class Parser(argparse.ArgumentParser):
  """An argument parser without abbreviations, whose errors are `UserError`s."""

  def __init__(self, **options):
    super().__init__(**options, allow_abbrev=False)

  def parse_known_args(self, args=None, namespace=None):
    """Parse arguments. Refuse the value `--`, which argparse replaces with an empty list."""
    args = sys.argv[1:] if args is None else args
    own = [*itertools.takewhile('--'.__ne__, args)]
    if wrong := next((arg for arg in own if re.fullmatch(r'--?\w+=--', arg)), None):
      self.error(f'{wrong}: -- is not a value')
    if wrong := find_missing_commas(own):
      self.error(wrong)
    return super().parse_known_args(args, namespace)

  def error(self, message: str):
    """Raise UserError instead of exiting."""
    raise UserError(f'{message}; see {self.prog} --help')


def find_missing_commas(args: list[str]) -> str:
  """Return an error message if spaces separate the numbers of a flag that takes one word, or ''."""
  for i, flag in enumerate(args):
    if flag in _COMMA_FLAGS:
      numbers = [*itertools.takewhile(re.compile(r'[\d.]+,?').fullmatch, args[i + 1 :])]
      if len(numbers) > 1:
        joined = ','.join(number.strip(',') for number in numbers)
        return f'{flag} {" ".join(numbers)}: expected commas and no spaces: {flag} {joined}'
  return ''


def positive_int(text: str) -> int:
  """Parse an integer from 1."""
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f'{text!r} is not a positive integer')
  return int(text)


def non_negative_int(text: str) -> int:
  """Parse an integer from 0."""
  return 0 if text == '0' else positive_int(text)


def positive_float(text: str) -> float:
  """Parse a finite number above 0."""
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value < float('inf'):
    raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
  return value


def probability(text: str) -> float:
  """Parse a number above 0, and at most 1."""
  try:
    if (value := positive_float(text)) <= 1:
      return value
  except argparse.ArgumentTypeError:
    pass
  raise argparse.ArgumentTypeError(f'{text!r} is not a probability above 0')


def duration(text: str) -> float:
  """Parse '90s', '5m' or '2h' as seconds."""
  seconds = {'s': 1, 'm': 60, 'h': 3600}.get(text[-1:], 0)
  try:
    return positive_float(text[:-1]) * seconds if seconds else positive_float('')
  except argparse.ArgumentTypeError:
    raise argparse.ArgumentTypeError(f'{text!r} is not a time such as 90s, 5m or 2h') from None


def image_size(text: str) -> tuple[int, int]:
  """Parse '224' or '224,320' as (height, width)."""
  values = text.split(',')
  if len(values) > 2 or not all(value.isdecimal() and int(value) for value in values):
    raise argparse.ArgumentTypeError(f'{text!r}: expected pixels, SIDE or HEIGHT,WIDTH')
  return int(values[0]), int(values[-1])


def channel_values(text: str) -> tuple[float, float, float]:
  """Parse '0.5' or '0.485,0.456,0.406' as three numbers from 0 to 1."""
  try:
    values = tuple(float(value) for value in text.split(','))
  except ValueError:
    values = ()
  if len(values) not in (1, 3) or not all(0 <= value <= 1 for value in values):
    raise argparse.ArgumentTypeError(
      f'{text!r}: expected three numbers from 0 to 1, such as 0.485,0.456,0.406'
    )
  return values * (3 // len(values))


# A keyword of `load` -> the options of its flag.
MODEL_FLAGS = {
  'size': {
    'type': image_size,
    'help': 'image size in pixels, SIDE or HEIGHT,WIDTH; position embeddings are resampled to it',
  },
  'positions': {
    'choices': ('corner', 'half_pixel', 'bicubic'),
    'help': 'resampling of position embeddings: corner-aligned bilinear as in the paper, '
    'half-pixel bilinear, or bicubic',
  },
  'patch': {
    'type': positive_int,
    'help': 'patch side in pixels; patch kernels are resized to it as in FlexiViT',
  },
  'crop': {
    'choices': CHOICES['data.eval_crop'],
    'help': 'resize: to the size of the model; center: scale the short side, then crop; squash: '
    'resize to a square, then crop; border: fit into a square and pad; none: crop without resizing',
  },
  'short_side': {
    'type': positive_int,
    'help': 'pixels that the short side is scaled to before the center crop',
  },
  'interpolation': {
    'choices': CHOICES['data.interpolation'],
    'help': "filter for resizing: tf_* are TensorFlow's, pil_* are Pillow's antialiased ones",
  },
  'orient': {
    'choices': CHOICES['data.orient'],
    'help': 'exif: turn photos upright by their EXIF tag; ignore: leave them as stored; auto: exif '
    'for files, ignore for TFDS',
  },
  'jpeg_dct': {
    'choices': CHOICES['data.jpeg_dct'],
    'help': "inverse DCT of JPEGs: fast is TensorFlow's, accurate is Pillow's; auto: accurate for "
    'files, fast for TFDS',
  },
  'mean': {
    'type': channel_values,
    'help': 'mean of pixels in [0, 1], one number or three, such as 0.485,0.456,0.406',
  },
  'std': {
    'type': channel_values,
    'help': 'standard deviation of pixels in [0, 1], such as 0.229,0.224,0.225',
  },
  'gelu': {
    'choices': ('tanh', 'erf', 'quick'),
    'help': "GELU: its tanh approximation, the exact erf, or CLIP's quick form",
  },
  'norm_eps': {'type': float, 'help': 'epsilon that LayerNorm adds to the variance'},
  'heads': {'type': positive_int, 'help': 'attention heads, if no file states them'},
  'dtype': {'choices': ('float32', 'bfloat16'), 'help': 'dtype of the computation'},
  'base': {
    'metavar': 'SOURCE',
    'help': 'the model that a file of adapters belongs to, if it is not where training found it',
  },
  'labels': {'help': 'class names: imagenet1k, imagenet21k, or a file with a name per line'},
}
PREPROCESSING_FLAGS = (
  'size', 'crop', 'short_side', 'interpolation', 'orient', 'jpeg_dct', 'mean', 'std',
)  # fmt: skip


def add_model_flags(
  command: argparse.ArgumentParser,
  names: Iterable[str] = tuple(MODEL_FLAGS),
  *,
  required: bool = True,
):
  """Add --init and a flag for each of the overrides of the model that `names` lists."""
  command.add_argument(
    '--init',
    required=required,
    metavar='SOURCE',
    help='a catalogue name, a file (.npz, .safetensors, .pth), a Hugging Face directory, '
    'a run directory, a URL, or hf:ORG/NAME',
  )
  group = command.add_argument_group('model', 'override or complete what the files state')
  for name in names:
    group.add_argument(f'--{name}', **MODEL_FLAGS[name])


def add_batch_flag(command: argparse.ArgumentParser):
  """Add --batch."""
  command.add_argument(
    '--batch',
    type=positive_int,
    help='images in a batch, over all devices (default: the evaluation batch of a run directory, '
    'at most 256 per device; for other models 16 on a CPU, 128 on other devices)',
  )


def add_host_flags(command: argparse.ArgumentParser):
  """Add the flags that describe the processes of a run. Environment variables set the defaults."""
  defaults = {
    name: os.environ.get(f'VIT_JAX_{name.upper()}')
    for name in ('coordinator', 'processes', 'process')
  }
  command.add_argument(
    '--coordinator',
    metavar='HOST:PORT',
    default=defaults['coordinator'],
    help='address of process 0; not needed on TPU pods, GKE and SLURM',
  )
  command.add_argument(
    '--processes',
    type=non_negative_int,
    default=defaults['processes'] or '0',
    metavar='N',
    help='number of processes; 0 (default): those of the TPU pod or SLURM job, or one',
  )
  command.add_argument(
    '--process',
    type=non_negative_int,
    default=defaults['process'],
    metavar='I',
    help='index of this process, from 0',
  )
  command.add_argument(
    '--hosts_timeout',
    type=positive_int,
    default=300,
    metavar='SECONDS',
    help='time to wait for the other hosts at the start (default: 300)',
  )


def parse_host_flags(args: argparse.Namespace) -> dict[str, object]:
  """Return the flags of `add_host_flags` as keywords of `join_cluster`."""
  return {
    'coordinator': args.coordinator,
    'processes': args.processes,
    'process_id': args.process,
    'timeout': args.hosts_timeout,
  }


def eval_batch_size(args: argparse.Namespace) -> int:
  """Return --batch or its default.

  The batches of a run directory have the size of the run, so that the numbers are those that
  training printed. They are limited to 256 images per device, so that a run of a pod fits one
  machine. A CPU takes a third less time with batches that fit its caches. Other devices need large
  batches.
  """
  import jax

  if args.batch:
    return args.batch
  run = Path(args.init)
  if (run / 'config.json').is_file() and (run / 'preprocessing.json').is_file():
    from vit_jax.checkpoint.run_directory import read_run_config
    from vit_jax.sharding.mesh import count_devices

    data = read_run_config(run).data
    return min(data.eval_batch or data.batch, _MAX_EVAL_BATCH_PER_DEVICE * count_devices())
  return 16 if jax.default_backend() == 'cpu' else 128


def model_overrides(args: argparse.Namespace) -> dict:
  """Return the overrides of the model as keywords of `load`."""
  values = {name: getattr(args, name, None) for name in MODEL_FLAGS}
  overrides = {name: value for name, value in values.items() if value is not None}
  if 'labels' in overrides:
    overrides['labels'] = read_label_names(overrides['labels'])
  return overrides


def read_label_names(text: str) -> tuple[str, ...]:
  """Return the class names of --labels. Raises UserError if the file cannot be read."""
  from vit_jax.data.imagenet import imagenet_class_names

  if text in ('imagenet1k', 'imagenet21k'):
    return imagenet_class_names(text)
  if Path(text).exists() and not Path(text).is_file():
    raise UserError(f'--labels {text}: it is not a regular file')
  try:
    lines = Path(text).read_text(encoding='utf-8-sig').split('\n')
    return tuple(lines if lines[-1] else lines[:-1])
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'--labels {text}: {reason}; expected imagenet1k, imagenet21k or a file with a name per line'
    ) from None


def load_model(args: argparse.Namespace):
  """Load the model of --init with its overrides, and print its notes to stderr."""
  from absl import logging

  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.pretrained.loading import load

  logging.set_verbosity(logging.WARNING)  # Hide the progress that libraries log.
  enable_compilation_cache()
  overrides = model_overrides(args)
  model = load(args.init, **overrides)
  if 'short_side' in overrides and model.preprocessing.resize_size is None:
    raise UserError('--short_side needs --crop center: this model resizes the image without a crop')
  print_notes(model)
  return model


def print_notes(model):
  """Print to stderr, on host 0, what was assumed or left out when a model was loaded."""
  from vit_jax.runtime.cluster import print_on_first_host

  for note in model.notes:
    print_on_first_host(f'{model.source}: {note}')
