"""The command `finetune`: choose the settings for a folder of photos, show them, and train."""

import argparse
import math
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
from vit_jax.cli.report import add_report_flag, write_run_report
from vit_jax.errors import UserError, mask_credentials
from vit_jax.recipes import differences_from_recipe, format_flags

DATA_HELP = (
  'a folder of photos with a folder for each class, a .csv file of lines path,label;label, or a '
  'source such as tfds:cifar10'
)
# The flags of the model that are also settings of a run.
FINETUNE_MODEL_FLAGS = (
  'size', 'positions', 'crop', 'short_side', 'interpolation', 'orient', 'jpeg_dct', 'mean', 'std',
  'gelu', 'norm_eps',
)  # fmt: skip

LORA_RANK = 16  # Of --lora without a number.


def finetune(args: argparse.Namespace):
  """Fine-tune a model on a folder of photos, with settings that are chosen and printed."""
  from vit_jax.cli.jobs import default_workdir, parse_config_flags, training_runtime
  from vit_jax.config_checks import validate

  began = time.monotonic()
  check_length_flags(args.time, args.settings)
  source, images = open_photos(args.data)
  workdir = Path(args.workdir or default_workdir(Path(source.partition(':')[2]).stem))
  with training_runtime(args.workdir, **parse_host_flags(args)) as runtime:
    import jax

    from vit_jax.train import train

    model, settings = plan(args, source, images)
    if seconds := planned_seconds(args.time, args.settings):
      steps = _recorded_steps(workdir) or steps_in(seconds, settings, workdir, began)
      settings = with_steps(settings, steps)
    config = validate(parse_config_flags(settings))
    is_first = jax.process_index() == 0
    if is_first:
      print_plan(model, config, workdir)
    train(config, workdir, **runtime)
    if args.report:
      write_run_report(workdir, runtime['watchdog'])
  if is_first:
    print(f'\nvit-jax predict --init {shlex.quote(str(workdir))} IMAGE …')


def check_length_flags(seconds: float | None, settings: list[str]):
  """Raise UserError if the user gives both a time and a number of steps or epochs."""
  if seconds and _has_length(settings):
    raise UserError('--time chooses the steps: give it without --config.steps and .epochs')


def open_photos(data: str):
  """Return (name, source) of the training images of `data`, before JAX is loaded.

  Raises UserError if there are none.
  """
  from vit_jax.data.sources import open_source

  name = _source_name(data)
  return name, open_source(name, 'train')


def plan(args, source: str, images) -> tuple[object, list[str]]:
  """Return the model and the flags of `train` for it, with a number of epochs.

  Raises UserError if the devices have no plan.
  """
  import jax

  from vit_jax.training.finetune_plan import DEVICE_PLANS

  model = load_model(args)
  platform = jax.default_backend()
  if platform not in DEVICE_PLANS:
    raise UserError(
      f'there is no plan for the platform {platform!r}, only for {", ".join(DEVICE_PLANS)}: '
      'use vit-jax train'
    )
  flags = plan_flags(model, source, images, platform, args)
  return model, [f'--config={recipe_of(model)}', *format_flags(flags), *args.settings]


def planned_seconds(seconds: float | None, settings: list[str]) -> float:
  """Return the time that a run may take; 0 if the number of steps or epochs is given."""
  import jax

  from vit_jax.training.finetune_plan import DEVICE_PLANS

  return 0 if _has_length(settings) else seconds or DEVICE_PLANS[jax.default_backend()].seconds


def with_steps(settings: list[str], steps: int) -> list[str]:
  """Return the flags with a number of steps instead of epochs."""
  return [*settings, f'--config.steps={steps}', '--config.epochs=0']


def _source_name(data: str) -> str:
  """Return the name of the source: a folder or a .csv file, or a name such as tfds:cifar10."""
  from vit_jax.data.sources import kind_of_path

  kind = kind_of_path(Path(data))
  if kind and (kind != 'csv' or data.lower().endswith('.csv')):
    return f'{kind}:{data}'
  if ':' in data:
    return data
  raise UserError(
    f'{data}: there is no such folder or .csv file. Expected PATH/CLASS/IMAGE, '
    'PATH/train/CLASS/IMAGE, a CSV file of lines path,label, or a source such as tfds:cifar10'
  )


def plan_flags(model, source: str, images, platform: str, args) -> dict[str, object]:
  """Return the planned settings that differ from the recipe's."""
  from vit_jax.sharding.mesh import count_devices
  from vit_jax.training.finetune_plan import plan_lora, plan_settings

  settings = plan_settings(
    model,
    platform,
    source=source,
    images=len(images),
    max_labels=images.max_labels,
    class_counts=images.class_counts(),
    keep_size=args.size is not None,
    devices=count_devices(),
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
  return differences_from_recipe(settings, recipe_of(model))


def recipe_of(model) -> str:
  """Return the recipe that a plan is based on."""
  return f'finetune:{model.config.variant},folder'


def _has_length(settings: list[str]) -> bool:
  """Return whether the user chose the number of steps or epochs."""
  names = [setting.partition('=')[0].lstrip('-') for setting in settings]
  return 'config.steps' in names or 'config.epochs' in names


def _recorded_steps(workdir: Path) -> int:
  """Return the number of steps of the run in `workdir`, which is resumed, or 0 without a run."""
  from vit_jax.checkpoint.run_directory import read_run_config

  return read_run_config(workdir).steps if (workdir / 'config.json').is_file() else 0


def steps_in(seconds: float, settings: list[str], workdir: Path, began: float) -> int:
  """Return the number of steps that fit into `seconds` since `began`, by measuring a few.

  Raises UserError if these are too few for fine-tuning.
  """
  import numpy as np
  from jax.experimental.multihost_utils import broadcast_one_to_all

  from vit_jax.cli.jobs import parse_config_flags
  from vit_jax.config_checks import validate
  from vit_jax.runtime.cluster import print_on_first_host
  from vit_jax.runtime.watchdog import Watchdog
  from vit_jax.training.finetune_plan import MIN_STEPS, fit_into_seconds
  from vit_jax.training.initial_head import MAX_PROBE_EXAMPLES
  from vit_jax.training.setup import set_up
  from vit_jax.training.step_time import measure_step_time

  config = validate(parse_config_flags(settings))
  print_on_first_host('measuring the time of a step')
  run = set_up(config, workdir, Watchdog())
  step, compilation = measure_step_time(run)
  train, test = len(run.train_source.labelled), len(run.eval_source)
  probe = min(train, MAX_PROBE_EXAMPLES) + min(test, MAX_PROBE_EXAMPLES)
  scale = math.prod(config.data.eval_image_size) / math.prod(config.data.size)
  left = seconds - (time.monotonic() - began)
  steps = fit_into_seconds(
    left,
    step=step,
    overhead=compilation,
    eval_images=probe * (config.init_head == 'probe') + test * scale,
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
  from vit_jax.data.preprocessing import describe_sizes

  data, optim = config.data, config.optim
  length = f'{config.steps} steps' if config.steps else f'{config.epochs:g} epochs'
  first = {
    'probe': 'a linear probe starts the head',
    'new': 'a head of zeros',
    'keep': 'the head of the model',
  }[config.init_head]
  rank = config.lora.rank
  trained = f'it and adapters of rank {rank}' if rank else 'all parameters'
  command = format_train_command(config, recipe_of(model), workdir)
  print(
    f'{model.source}: {config.model.variant}\n'
    f'{data.train} at {describe_sizes(data)}, resized with {data.interpolation}\n'
    f'{first}, then {trained}: {length} of {data.batch} images, {optim.name}, '
    f'lr {optim.lr:.2g}, layer decay {optim.layer_decay:g}, class weights {config.class_weights}\n'
    f'the same by hand:\n  {mask_credentials(command)}',
    flush=True,
  )


def format_train_command(config, recipe: str, workdir: Path) -> str:
  """Return the command that trains with a config, as a shell reads it."""
  from vit_jax.settings.fields import flatten_config

  flags = format_flags(differences_from_recipe(flatten_config(config), recipe))
  return shlex.join(['vit-jax', 'train', f'--config={recipe}', *flags, f'--workdir={workdir}'])


def add_lora_flag(command: argparse.ArgumentParser):
  """Add --lora to a command that plans a run."""
  command.add_argument(
    '--lora',
    type=positive_int,
    nargs='?',
    const=LORA_RANK,
    metavar='RANK',
    help=f'train the head and adapters of this rank, LoRA, not all parameters ({LORA_RANK})',
  )


def add(commands):
  """Add the command and its arguments."""
  command = commands.add_parser('finetune', help=finetune.__doc__, description=finetune.__doc__)
  command.set_defaults(function=finetune, takes_settings=True)
  command.epilog = (
    '--config.FIELD=VALUE changes a setting of the plan. The tables of the plan are in '
    'vit_jax/training/finetune_plan.py.'
  )
  command.add_argument('data', metavar='DATA', help=DATA_HELP)
  command.add_argument(
    '--time',
    type=duration,
    metavar='TIME',
    help='time that the run may take, such as 90s, 5m or 2h (default: 330s on a CPU; elsewhere the '
    'number of images decides)',
  )
  add_lora_flag(command)
  command.add_argument(
    '--workdir', metavar='DIR', help='run directory; by default runs/FOLDER-TIME'
  )
  add_report_flag(command)
  add_model_flags(command, FINETUNE_MODEL_FLAGS)
  add_host_flags(command)
