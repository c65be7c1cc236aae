"""A run's directory: what the run is (config, preprocessing, labels, data, versions), for whoever has it and nothing else.

    config.json  preprocessing.json  labels.txt  data.json  versions.json  metrics.jsonl  tensorboard/  checkpoints/STEP/

The checkpoints are checkpoint.py's.
"""

import importlib.metadata
import json
import platform
from pathlib import Path

import jax

from vit_jax.config import Config, config_from_dict, config_to_dict, flatten_config, rename_settings
from vit_jax.config_checks import CHOICES, validate
from vit_jax.data.fingerprint import describe_differences
from vit_jax.errors import UserError
from vit_jax.runtime.files import (
  explain_write_errors,
  read_json_object,
  read_text_file,
  write_atomically,
)

# Settings that may differ when a run goes on: they change what is shown, kept or how fast it goes, or say where data lie, and
# no number.
MUTABLE_ON_RESUME = {
  'log_every', 'eval_every', 'save_every', 'max_to_keep', 'keep_every', 'mesh.fsdp', 'model.remat', 'model.unroll',
  'data.dir', 'data.pseudo_labels', 'data.eval_batch', 'data.workers', 'data.threads', 'data.prefetch', 'data.max_bad_fraction',
  'optim.max_bad_steps', 'log_ids', 'first_step_timeout', 'step_timeout', 'probes', 'probe_every', 'fewshot_l2',
}  # fmt: skip

_RECORDED_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
  'opencv-python-headless',
  'simplejpeg',
)


def write_run_description(
  workdir: Path, config: Config, labels: tuple[str, ...], facts: dict[str, object] | None = None
):
  """Writes what the run is, so that whoever has the directory needs nothing else; the first of several hosts does.

  `facts`: of its data, as fingerprint.py tells them. UserError where the directory holds a run with another config or other
  data (the differing fields are listed) or can't be written.
  """
  check_same_run(workdir, config, labels, facts)
  if jax.process_index():
    return
  with explain_write_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES} | {
      'python': platform.python_version()
    }
    data, model = config.data, config.model
    preprocessing = {
      'size': data.size, 'crop': data.eval_crop, 'short_side': data.eval_short_side, 'mean': model.mean, 'scale': model.scale,
    }  # fmt: skip
    texts = {
      'preprocessing.json': json.dumps(preprocessing, indent=2),
      'labels.txt': '\n'.join(labels),
      'versions.json': json.dumps(versions, indent=2),
      **({'data.json': json.dumps(facts, indent=2)} if facts else {}),
      'config.json': json.dumps(
        config_to_dict(config), indent=2
      ),  # Last: a directory that has it has all.
    }
    for name, text in texts.items():
      write_atomically(workdir / name, text + '\n')


def check_same_run(
  workdir: Path, config: Config, labels: tuple[str, ...], facts: dict[str, object] | None = None
):
  """UserError where `workdir` holds a run that this one would not continue. `facts` are its data's."""
  if not (workdir / 'config.json').exists():
    return
  old, new = flatten_config(read_run_config(workdir)), flatten_config(config)
  differ = [
    f'{name}: {old[name]} there, {new[name]} here'
    for name in new
    if name not in MUTABLE_ON_RESUME and old[name] != new[name]
  ]
  if differ:
    raise UserError(
      f'{workdir} holds another run; choose another --workdir. The configs differ in '
      + '; '.join(differ)
    )
  if read_run_labels(workdir) != labels:
    raise UserError(
      f'{workdir} holds a run on other classes than {config.data.train} has now; choose another --workdir'
    )
  path = workdir / 'data.json'
  if differ := describe_differences(read_json_object(path) if path.exists() else {}, facts or {}):
    raise UserError(
      f'{workdir} holds a run on other data than there are now: {"; ".join(differ)}. Choose another --workdir, or '
      f'remove {path} to go on with what there is now'
    )


def read_run_config(workdir: Path) -> Config:
  """The config of the run in `workdir`. UserError where there is none, or it is not as one was written."""
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(f'{workdir} is no run directory: it has no config.json')
  try:
    return validate(config_from_dict(rename_settings(read_json_object(path))))
  except UserError as error:
    raise UserError(f'{path}: {error}') from None


def read_run_labels(workdir: Path) -> tuple[str, ...]:
  """The names of the classes of the run in `workdir`, in the order of the logits."""
  return tuple(read_text_file(workdir / 'labels.txt').splitlines())


def read_run_preprocessing(workdir: Path) -> dict:
  """What an image goes through: size, crop, short_side, mean and scale. UserError where the file says anything else."""
  path = workdir / 'preprocessing.json'
  facts = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in read_json_object(path).items()
  }
  numbers = lambda count, kind: (
    lambda x: isinstance(x, tuple) and len(x) == count and all(isinstance(v, kind) for v in x)
  )
  expected = {
    'size': numbers(2, int),
    'crop': lambda x: x in CHOICES['data.eval_crop'],
    'short_side': lambda x: isinstance(x, int),
    'mean': numbers(3, int | float),
    'scale': numbers(3, int | float),
  }
  wrong = [name for name, fits in expected.items() if not fits(facts.get(name))] + sorted(
    facts.keys() - expected
  )
  if wrong:
    raise UserError(f'{path}: {wrong[0]} is {facts.get(wrong[0])!r}, which no run of ours writes')
  return facts
