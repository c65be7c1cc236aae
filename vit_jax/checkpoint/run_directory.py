"""The files that make a run directory self-contained.

    config.json  preprocessing.json  labels.txt  data.json  versions.json
    metrics.jsonl  goodput.jsonl  tensorboard/  checkpoints/STEP/  curves.png  predictions.npz
    report.html  wandb/  wandb.id  mlflow.id

This module writes and reads the first line; manager.py handles the checkpoints.
"""

import importlib.metadata
import json
import platform
from pathlib import Path

import jax

from vit_jax.checkpoint.renamed_settings import rename_settings
from vit_jax.config import Config
from vit_jax.config_checks import validate_values
from vit_jax.data.fingerprint import describe_differences
from vit_jax.data.preprocessing import Preprocessing, eval_preprocessing, preprocessing_from_dict
from vit_jax.errors import UserError, mask_credentials
from vit_jax.runtime.files import (
  explain_write_errors,
  read_json_object,
  read_text_file,
  write_atomically,
)
from vit_jax.settings.conditions import settings_without_effect
from vit_jax.settings.fields import config_from_dict, config_to_dict, flatten_config, with_settings
from vit_jax.sharding.mesh import describe_devices

# Settings that may differ when a run is resumed. They change no result: only what is shown or
# retained, the speed, or where data are.
# fmt: off
MUTABLE_ON_RESUME = {
  'log_every', 'eval_every', 'save_every', 'max_to_keep', 'keep_every', 'mesh.fsdp', 'model.remat',
  'model.unroll', 'data.dir', 'data.pseudo_labels', 'data.eval_batch', 'data.workers',
  'data.threads', 'data.prefetch', 'data.max_bad_fraction', 'optim.max_bad_steps', 'log_ids',
  'first_step_timeout', 'step_timeout', 'probes', 'probe_every', 'fewshot_l2', 'profile', 'writers',
  'distill.variant',
}
# Setting -> the value of runs whose config.json lacks it: what the code did before it existed.
UNRECORDED_SETTINGS = {'data.orient': 'ignore', 'data.jpeg_dct': 'fast'}
_RECORDED_PACKAGES = (
  'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'opencv-python-headless',
  'simplejpeg',
)
# fmt: on


def write_run_description(
  workdir: Path, config: Config, labels: tuple[str, ...], facts: dict[str, object] | None = None
):
  """Write the config, preprocessing, labels, data facts and package versions of a run.

  Host 0 writes. `facts` describe the data, as `fingerprint_data` returns them. Raises UserError if
  the directory holds another run (see `check_same_run`) or cannot be written.
  """
  check_same_run(workdir, config, labels, facts)
  if jax.process_index():
    return
  preprocessing = eval_preprocessing(config.data, config.model).to_dict()
  versions = {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES}
  versions |= {'python': platform.python_version(), 'devices': describe_devices()}
  texts = {
    'preprocessing.json': json.dumps(preprocessing, indent=2),
    'labels.txt': '\n'.join(labels),
    'versions.json': json.dumps(versions, indent=2),
    **({'data.json': json.dumps(facts, indent=2)} if facts else {}),
    # Last, so that a directory with a config has all the files.
    'config.json': json.dumps(config_to_dict(without_credentials(config)), indent=2),
  }
  with explain_write_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
      write_atomically(workdir / name, text + '\n')


def check_same_run(
  workdir: Path, config: Config, labels: tuple[str, ...], facts: dict[str, object] | None = None
):
  """Raise UserError if `workdir` holds a run with another config, other labels or other data.

  `facts` describe the data, as `fingerprint_data` returns them. The message lists the differences.
  """
  with explain_write_errors(workdir):  # Its name may be too long, or its parent not readable.
    if not (workdir / 'config.json').exists():
      return
  stored = read_run_config(workdir)
  # Passwords are not stored, so that they may also change.
  old, new = (flatten_config(without_credentials(each)) for each in (stored, config))
  free = MUTABLE_ON_RESUME | settings_without_effect(stored).keys()
  differ = [
    f'{name}: {old[name]} there, {new[name]} here'
    for name in new
    if name not in free and old[name] != new[name]
  ]
  if differ:
    raise UserError(
      f'{workdir} holds another run. Choose another --workdir, or repeat the settings of that run '
      f'to resume it. The configs differ in {"; ".join(differ)}'
    )
  if read_run_labels(workdir) != labels:
    raise UserError(
      f'{workdir} holds a run with other classes than {config.data.train} has now; '
      'choose another --workdir'
    )
  path = workdir / 'data.json'
  if differ := describe_differences(read_json_object(path) if path.exists() else {}, facts or {}):
    raise UserError(
      f'the data or the teacher of the run in {workdir} have changed: {"; ".join(differ)}. '
      f'Choose another --workdir, or remove {path} to resume with the new ones'
    )


def without_credentials(config: Config) -> Config:
  """Return the config with user names and passwords of URLs replaced by '***'."""
  texts = {name: value for name, value in flatten_config(config).items() if isinstance(value, str)}
  return with_settings(config, {name: mask_credentials(text) for name, text in texts.items()})


def read_run_config(workdir: Path) -> Config:
  """Return the config of the run in `workdir`. Raises UserError if it is missing or invalid."""
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(f'{workdir} is not a run directory: it has no config.json')
  try:
    values = rename_settings(read_json_object(path))
    config = validate_values(config_from_dict(values))
    return with_settings(config, _unrecorded_settings(values, config))
  except UserError as error:
    raise UserError(f'{path}: {error}') from None


def adopt_unrecorded_settings(config: Config, workdir: Path) -> Config:
  """Return `config` with what an older version did in settings that the run does not record.

  Settings that are not at their default are unchanged. So the command that started a run resumes
  it.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    return config
  stored = read_run_config(workdir)
  unrecorded = _unrecorded_settings(rename_settings(read_json_object(path)), stored)
  chosen, defaults = flatten_config(config), flatten_config(Config())
  unchanged = {name: value for name, value in unrecorded.items() if chosen[name] == defaults[name]}
  return with_settings(config, unchanged)


def _unrecorded_settings(values: dict, config: Config) -> dict[str, object]:
  """Return what `UNRECORDED_SETTINGS` were in a run, `values` as JSON, that does not have them.

  Those without effect in `config` are left out.
  """
  missing = {
    name: value
    for name, value in UNRECORDED_SETTINGS.items()
    if name.rpartition('.')[2] not in values.get(name.rpartition('.')[0], {})
  }
  idle = settings_without_effect(with_settings(config, missing))
  return {name: value for name, value in missing.items() if name not in idle}


def read_run_labels(workdir: Path) -> tuple[str, ...]:
  """Return the class names of the run in `workdir`, in the order of the logits."""
  text = read_text_file(workdir / 'labels.txt').removesuffix('\n')
  # Not `splitlines`, because names may contain other line separators of Unicode.
  return tuple(text.split('\n')) if text else ()


def read_run_preprocessing(workdir: Path) -> Preprocessing:
  """Return the preprocessing of images. Raises UserError if the file holds anything else.

  An older version recorded fewer steps. The others are what it did.
  """
  path = workdir / 'preprocessing.json'
  return preprocessing_from_dict(read_json_object(path), str(path))
