"""Arguments that several commands have: which model, and what may be said of it that its file does not say."""

import argparse
import os
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.runtime.cluster import print_stderr


class Parser(argparse.ArgumentParser):
  """Takes no abbreviations, and what is wrong with a command line is a UserError like any other mistake."""

  def __init__(self, **options):
    super().__init__(**options, allow_abbrev=False)

  def error(self, message: str):
    raise UserError(f'{message}; see {self.prog} --help')


def positive(text: str) -> int:
  """A whole number from 1."""
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f'{text!r} is no whole number from 1')
  return int(text)


def whole(text: str) -> int:
  """A whole number from 0."""
  return 0 if text == '0' else positive(text)


def above_zero(text: str) -> float:
  """A finite number above 0."""
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value < float('inf'):
    raise argparse.ArgumentTypeError(f'{text!r} is no number above 0')
  return value


def sides(text: str) -> tuple[int, int]:
  """'224' or '224,320' -> (height, width)."""
  values = text.split(',')
  if len(values) > 2 or not all(value.isdecimal() and int(value) for value in values):
    raise argparse.ArgumentTypeError(f'{text!r}: expected pixels, SIDE or HEIGHT,WIDTH')
  return int(values[0]), int(values[-1])


def shares(text: str) -> tuple[float, float, float]:
  """'0.5' or '0.485,0.456,0.406' -> three shares of the range of a pixel."""
  try:
    values = tuple(float(value) for value in text.split(','))
  except ValueError:
    values = ()
  if len(values) not in (1, 3) or not all(0 <= value <= 1 for value in values):
    raise argparse.ArgumentTypeError(
      f'{text!r}: expected three shares of the range of a pixel, such as 0.485,0.456,0.406'
    )
  return values * (3 // len(values))


# A keyword of `load` -> what its flag takes. Names as `load` has them, so that what is said here is handed on as it is.
OVERRIDES = {
  'size': {
    'type': sides,
    'help': 'pixels, SIDE or HEIGHT,WIDTH: position embeddings are resampled to it',
  },
  'positions': {
    'choices': ('corner', 'half_pixel', 'bicubic'),
    'help': 'how position embeddings are resampled',
  },
  'patch': {'type': positive, 'help': 'pixels: patch kernels are resized to it, as FlexiViT does'},
  'crop': {
    'choices': ('resize', 'center'),
    'help': 'the whole image resized, or the middle cut from a larger one',
  },
  'short_side': {
    'type': positive,
    'help': 'pixels that the short side is resized to before the middle is cut',
  },
  'mean': {
    'type': shares,
    'help': 'of a pixel in [0, 1], for red, green and blue: 0.485,0.456,0.406',
  },
  'std': {'type': shares, 'help': 'likewise: 0.229,0.224,0.225'},
  'gelu': {'choices': ('tanh', 'erf'), 'help': 'the form of GELU'},
  'norm_eps': {'type': float, 'help': 'what LayerNorm adds to the variance'},
  'heads': {'type': positive, 'help': 'attention heads, of files that do not tell'},
  'dtype': {'choices': ('float32', 'bfloat16'), 'help': 'of the computation'},
  'labels': {'help': 'names of the classes: imagenet1k, imagenet21k, or a file with one a line'},
}
PREPROCESSING = ('size', 'crop', 'short_side', 'mean', 'std')


def add_model(command: argparse.ArgumentParser):
  """--init, and a flag for everything that may be said of a model."""
  what = (
    'a catalogue name, an .npz, a .safetensors file or its directory, a run directory, or a URL'
  )
  command.add_argument('--init', required=True, metavar='SOURCE', help=what)
  said = command.add_argument_group(
    'what the model is', 'where its file does not say it, or says it wrong'
  )
  for name, options in OVERRIDES.items():
    said.add_argument(f'--{name}', **options)


def add_batch(command: argparse.ArgumentParser):
  """--batch."""
  command.add_argument(
    '--batch',
    type=positive,
    help='images at a time, over all devices; by default 16 on a CPU, 128 elsewhere',
  )


def add_hosts(command: argparse.ArgumentParser):
  """Which other processes take part; a launcher says it by environment variables."""
  option = command.add_argument
  said = {
    name: os.environ.get(f'VIT_JAX_{name.upper()}')
    for name in ('coordinator', 'processes', 'process')
  }
  option(
    '--coordinator',
    metavar='HOST:PORT',
    default=said['coordinator'],
    help='of process 0; TPU pods, GKE and SLURM know',
  )
  option(
    '--processes',
    type=whole,
    default=said['processes'] or '0',
    metavar='N',
    help='how many take part',
  )
  option(
    '--process',
    type=whole,
    default=said['process'],
    metavar='I',
    help='which of them this is, from 0',
  )
  option(
    '--hosts_timeout',
    type=positive,
    default=300,
    metavar='SECONDS',
    help='to wait for the other hosts',
  )


def hosts_of(args: argparse.Namespace) -> dict[str, object]:
  """What `add_hosts` takes, as `entry.join_hosts` has it."""
  return {
    'coordinator': args.coordinator,
    'processes': args.processes,
    'process_id': args.process,
    'timeout': args.hosts_timeout,
  }


def batch_size(args: argparse.Namespace) -> int:
  """What --batch says. A CPU spends a third less on batches that fit its caches; anything else wants large ones."""
  import jax

  return args.batch or (16 if jax.default_backend() == 'cpu' else 128)


def overrides(args: argparse.Namespace) -> dict:
  """What was said of the model, as keywords of `load`. UserError for what goes with nothing."""
  said = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
  if 'labels' in said:
    said['labels'] = label_names(said['labels'])
  return said


def label_names(text: str) -> tuple[str, ...]:
  """The names that --labels means."""
  from vit_jax.data.imagenet import imagenet_class_names

  if text in ('imagenet1k', 'imagenet21k'):
    return imagenet_class_names(text)
  try:
    return tuple(Path(text).read_text(encoding='utf-8').splitlines())
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'--labels {text}: {reason}; expected imagenet1k, imagenet21k or a file with a name a line'
    ) from None


def load_model(args: argparse.Namespace):
  """The model of --init and its flags, ready to run; what was assumed of it goes to stderr."""
  from absl import logging

  from vit_jax.cli.jobs import enable_compilation_cache
  from vit_jax.pretrained.loading import load

  logging.set_verbosity(logging.WARNING)  # Libraries' own progress is not ours.
  enable_compilation_cache()
  said = overrides(args)
  model = load(args.init, **said)
  if 'short_side' in said and model.preprocessing['crop'] != 'center':
    raise UserError(
      '--short_side goes with --crop center: this model takes the whole image, resized'
    )
  for note in model.notes:
    print_stderr(f'{model.source}: {note}')
  return model
