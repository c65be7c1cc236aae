"""The command `finetune`: choose the settings for a folder of photos, show them, and train."""

import argparse
import shlex
import time
from pathlib import Path

from vit_jax.cli.arguments import (
  add_host_flags,
  add_model_flags,
  duration,
  load_model,
  parse_host_flags,
  positive_int,
)
from vit_jax.errors import UserError, mask_credentials

# The flags of the model that are also settings of a run.
_MODEL_FLAGS = (
  'size', 'positions', 'crop', 'short_side', 'interpolation', 'orient', 'jpeg_dct', 'mean', 'std',
  'gelu', 'norm_eps',
)  # fmt: skip

LORA_RANK = 16  # Of --lora without a number.


def finetune(args: argparse.Namespace):
  """Fine-tune a model on a folder of photos, with settings that are chosen and printed."""
  from vit_jax.cli.jobs import default_workdir, parse_config_flags, training_runtime
  from vit_jax.config_checks import validate
  from vit_jax.data.sources import open_source

  began = time.monotonic()
  if args.time and _has_length(args.settings):
    raise UserError('--time chooses the steps: give it without --config.steps and .epochs')
  source = _source_name(args.data)
  images = open_source(source, 'train')  # Raises UserError before JAX is loaded.
  workdir = Path(args.workdir or default_workdir(Path(source.partition(':')[2]).stem))
  with training_runtime(args.workdir, **parse_host_flags(args)) as runtime:
    import jax

    from vit_jax.train import train
    from vit_jax.training.finetune_plan import DEVICE_PLANS

    model = load_model(args)
    platform = jax.default_backend()
    if platform not in DEVICE_PLANS:
      raise UserError(
        f'there is no plan for the platform {platform!r}, only for {", ".join(DEVICE_PLANS)}: '
        'use vit-jax train'
      )
    flags = plan_flags(model, source, images, platform, args)
    settings = [*format_flags(flags), *args.settings]
    seconds = args.time or DEVICE_PLANS[platform].seconds
    config = validate(parse_config_flags(_with_recipe(model, settings)))
    if seconds and not _has_length(args.settings):
      steps = _recorded_steps(workdir) or _steps_in(seconds, config, workdir, began)
      settings = [*settings, f'--config.steps={steps}', '--config.epochs=0']
      config = validate(parse_config_flags(_with_recipe(model, settings)))
    print_plan(model, config, workdir)
    train(config, workdir, **runtime)
  print(f'\nvit-jax predict --init {shlex.quote(str(workdir))} IMAGE …')


def _source_name(data: str) -> str:
  """Return the name of the source: a folder or a .csv file, or a name such as tfds:cifar10."""
  path = Path(data)
  if path.is_dir():
    return f'folder:{data}'
  if path.is_file() and path.suffix.lower() == '.csv':
    return f'csv:{data}'
  if ':' in data:
    return data
  raise UserError(
    f'{data}: there is no such folder or .csv file. Expected PATH/CLASS/IMAGE, '
    'PATH/train/CLASS/IMAGE, a CSV file of lines path,label, or a source such as tfds:cifar10'
  )


def plan_flags(model, source: str, images, platform: str, args) -> dict[str, object]:
  """Return the planned settings that differ from the recipe's."""
  from vit_jax.training.finetune_plan import plan_lora, plan_settings

  settings = plan_settings(
    model,
    platform,
    source=source,
    images=len(images),
    max_labels=images.max_labels,
    class_counts=images.class_counts(),
    keep_size=args.size is not None,
  )
  settings['init'] = args.init
  settings = plan_lora(settings, args.lora) if args.lora else settings
  if args.time:
    settings |= {'eval_every': '0', 'save_every': '0'}
  if _has_length(args.settings):
    settings['epochs'] = 0.0
  for name in ('orient', 'jpeg_dct'):
    if (value := getattr(args, name)) is not None:
      settings[f'data.{name}'] = value
  return differences_from_recipe(settings, _recipe(model))


def differences_from_recipe(settings: dict[str, object], recipe: str) -> dict[str, object]:
  """Return the settings whose values are not the recipe's."""
  from vit_jax.config import flatten_config
  from vit_jax.recipes import load_recipe

  defaults = flatten_config(load_recipe(recipe))
  return {name: value for name, value in settings.items() if value != defaults[name]}


def _recipe(model) -> str:
  return f'finetune:{model.config.variant},folder'


def _with_recipe(model, settings: list[str]) -> list[str]:
  return [f'--config={_recipe(model)}', *settings]


def format_flags(settings: dict[str, object]) -> list[str]:
  """Return settings as flags, such as --config.data.size=140,140."""

  def text(value) -> str:
    if isinstance(value, tuple):
      return ','.join(map(text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)

  return [f'--config.{name}={text(value)}' for name, value in settings.items()]


def _has_length(settings: list[str]) -> bool:
  """Return whether the user chose the number of steps or epochs."""
  names = [setting.partition('=')[0].lstrip('-') for setting in settings]
  return 'config.steps' in names or 'config.epochs' in names


def _recorded_steps(workdir: Path) -> int:
  """Return the number of steps of the run in `workdir`, which is resumed, or 0 without a run."""
  from vit_jax.checkpoint.run_directory import read_run_config

  return read_run_config(workdir).steps if (workdir / 'config.json').is_file() else 0


def _steps_in(seconds: float, config, workdir: Path, began: float) -> int:
  """Return the number of steps that fit into `seconds` since `began`, by measuring three.

  Raises UserError if these are too few for fine-tuning.
  """
  import numpy as np
  from jax.experimental.multihost_utils import broadcast_one_to_all

  from vit_jax.runtime.screen import print_stderr
  from vit_jax.runtime.watchdog import Watchdog
  from vit_jax.training.finetune_plan import MIN_STEPS, fit_into_seconds
  from vit_jax.training.initial_head import MAX_PROBE_EXAMPLES
  from vit_jax.training.setup import set_up
  from vit_jax.training.step_time import measure_step_time

  print_stderr('measuring the time of a step')
  run = set_up(config, workdir, Watchdog())
  step, compilation = measure_step_time(run)
  train, test = len(run.train_source.labelled), len(run.eval_source)
  probe = min(train, MAX_PROBE_EXAMPLES) + min(test, MAX_PROBE_EXAMPLES)
  left = seconds - (time.monotonic() - began)
  steps = fit_into_seconds(
    left,
    step=step,
    overhead=compilation,
    eval_images=probe * (config.init_head == 'probe') + test,
    batch=config.data.batch,
  )
  steps = int(broadcast_one_to_all(np.int32(steps)))  # Each host has measured another time.
  if steps < MIN_STEPS:
    missing = (MIN_STEPS - steps) * step
    raise UserError(
      f'--time: {seconds:.0f} s are too short for {MIN_STEPS} steps of {step:.2f} s, beside the '
      f'probe and the evaluation: allow {seconds + missing:.0f} s or more, or give a smaller --size'
    )
  return min(steps, run.steps)


def print_plan(model, config, workdir: Path):
  """Print what was chosen, and the command that does the same."""
  from vit_jax.config import flatten_config

  data, optim = config.data, config.optim
  length = f'{config.steps} steps' if config.steps else f'{config.epochs:g} epochs'
  first = {
    'probe': 'a linear probe starts the head',
    'new': 'a head of zeros',
    'keep': 'the head of the model',
  }[config.init_head]
  rank = config.lora.rank
  trained = f'it and adapters of rank {rank}' if rank else 'all parameters'
  flags = format_flags(differences_from_recipe(flatten_config(config), _recipe(model)))
  words = ['vit-jax', 'train', *_with_recipe(model, flags), f'--workdir={workdir}']
  command = shlex.join(words)
  print(
    f'{model.source}: {config.model.variant}\n'
    f'{data.train} at {"x".join(map(str, data.size))} pixels, resized with {data.interpolation}\n'
    f'{first}, then {trained}: {length} of {data.batch} images, {optim.name}, '
    f'lr {optim.lr:.2g}, layer decay {optim.layer_decay:g}, class weights {config.class_weights}\n'
    f'the same by hand:\n  {mask_credentials(command)}',
    flush=True,
  )


def add(commands):
  """Add the command and its arguments."""
  command = commands.add_parser('finetune', help=finetune.__doc__, description=finetune.__doc__)
  command.set_defaults(function=finetune, takes_settings=True)
  command.epilog = (
    '--config.FIELD=VALUE changes a setting of the plan. The tables of the plan are in '
    'vit_jax/training/finetune_plan.py.'
  )
  command.add_argument(
    'data',
    metavar='DATA',
    help='a folder of photos with a folder for each class, a .csv file of lines path,label;label, '
    'or a source such as tfds:cifar10',
  )
  command.add_argument(
    '--time',
    type=duration,
    metavar='TIME',
    help='time that the run may take, such as 90s, 5m or 2h (default: 5m on a CPU; elsewhere the '
    'number of images decides)',
  )
  command.add_argument(
    '--lora',
    type=positive_int,
    nargs='?',
    const=LORA_RANK,
    metavar='RANK',
    help=f'train the head and adapters of this rank (LoRA) in place of all parameters ({LORA_RANK})',
  )
  command.add_argument(
    '--workdir', metavar='DIR', help='run directory; by default runs/FOLDER-TIME'
  )
  add_model_flags(command, _MODEL_FLAGS)
  add_host_flags(command)
