"""The facts of a run that the page states, read from its directory."""

import dataclasses
import math
import shlex
from pathlib import Path

from vit_jax.checkpoint.run_directory import read_run_config, read_run_labels
from vit_jax.config import Config
from vit_jax.errors import UserError
from vit_jax.metrics.goodput import Goodput, read_goodput
from vit_jax.metrics.records import split_records
from vit_jax.recipes import differences_from_recipe, format_flags
from vit_jax.runtime.files import read_json_object
from vit_jax.settings.fields import flatten_config

BASELINE_NAMES = {
  'linear_probe': 'linear probe of the first features',
  'majority': 'most frequent class',
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
  """A run: what was trained, how, and how it ended."""

  workdir: Path
  config: Config
  labels: tuple[str, ...]
  records: list[dict]  # Of metrics.jsonl.
  goodput: Goodput | None
  versions: dict[str, str]
  warnings: list[str]

  @property
  def name(self) -> str:
    """The name of the directory."""
    return self.workdir.resolve().name

  @property
  def last_evaluation(self) -> dict:
    """The record of the last evaluation, or an empty one."""
    return next((each for each in reversed(self.records) if each['kind'] == 'eval'), {})

  @property
  def last_step(self) -> int:
    """The last step that metrics.jsonl records."""
    return max((record['step'] for record in self.records), default=0)

  @property
  def baselines(self) -> dict[str, float]:
    """The accuracies of a linear probe and of the most frequent class, if they are recorded."""
    return {
      title: value
      for record in self.records
      for name, value in record.items()
      for key, title in BASELINE_NAMES.items()
      if record['kind'] == 'probe' and name.endswith(f'_{key}')
    }

  @property
  def seconds(self) -> float:
    """The time of the steps, without evaluation and saving."""
    steps = [record for record in self.records if 'seconds_per_step' in record]
    begins = [0, *(record['step'] for record in steps)]
    return sum(
      (record['step'] - begin) * record['seconds_per_step']
      for record, begin in zip(steps, begins, strict=False)
    )


def read_run(workdir: Path) -> RunFacts:
  """Return the facts of the run in `workdir`. Raises UserError if it is not a run directory."""
  config = read_run_config(workdir)
  records, bad_lines = split_records(workdir / 'metrics.jsonl')
  versions = workdir / 'versions.json'
  return RunFacts(
    workdir=workdir,
    config=config,
    labels=read_run_labels(workdir),
    records=records,
    goodput=read_goodput(workdir),
    versions=read_json_object(versions) if versions.is_file() else {},
    warnings=list_warnings(workdir, records, bad_lines),
  )


def list_warnings(workdir: Path, records: list[dict], bad_lines: list[int]) -> list[str]:
  """Return a sentence for each kind of trouble that the files of a run record."""
  out = []
  skipped = [record['step'] for record in records if record['kind'] == 'bad_step']
  if skipped:
    reasons = sorted({str(r['left_out']) for r in records if r['kind'] == 'bad_step'})
    out.append(
      f'{len(skipped)} steps changed nothing ({", ".join(reasons).replace("_", " ")}); '
      f'the first is step {skipped[0]:,}'
    )
  unreadable = {id for r in records if r['kind'] == 'unreadable' for id in r['unreadable']}
  if unreadable:
    out.append(f'{len(unreadable)} training images could not be read')
  if bad_lines:
    out.append(f'{len(bad_lines)} lines of metrics.jsonl are not records of a step')
  crashes = sorted((workdir / 'failures').glob('*')) if (workdir / 'failures').is_dir() else []
  if crashes:
    out.append(f'the run ended early {len(crashes)} times; failures/ has the errors')
  losses = [record['loss'] for record in records if 'loss' in record]
  if any(isinstance(value, str) or not math.isfinite(value) for value in losses):
    out.append('the loss was not finite')
  return out


def equivalent_command(config: Config) -> list[str]:
  """Return the words, quoted, of the shortest `vit-jax train` command of this config."""
  values, best = flatten_config(config), None
  for recipe in (
    'quickstart',
    'quickstart_finetune',
    f'finetune:{config.model.variant},folder',
    f'pretrain:{config.model.variant},imagenet21k',
  ):
    try:
      flags = format_flags(differences_from_recipe(values, recipe))
    except UserError:  # The recipe does not have this model.
      continue
    if best is None or len(flags) < len(best) - 1:
      best = [f'--config={recipe}', *flags]
  return [shlex.quote(word) for word in ('vit-jax', 'train', *best)]
