"""Run published results, record ours beside them, and tell which records the code still supports.

A record is a row of reproduced.csv. Its digest covers what the number depends on: the settings and
the lowered train step (model, loss, optimizer, schedule, augmentation on the device). A second
digest covers the data: the examples, and the first batch of training and of evaluation. If either
has changed since, the record is stale. Of a run that it starts from, the settings alone count.
Records need no data to be checked, only to be made.
"""

import csv
import dataclasses
import hashlib
import io
import json
import statistics
import time
from pathlib import Path

import jax

from vit_jax.checkpoint.run_directory import MUTABLE_ON_RESUME
from vit_jax.config import Config
from vit_jax.data.fingerprint import fingerprint_data
from vit_jax.data.loader import eval_batches, train_batches
from vit_jax.data.preprocessing import eval_preprocessing
from vit_jax.data.sources import Source
from vit_jax.errors import UserError, did_you_mean, one_line
from vit_jax.paper.published_results import PUBLISHED_RESULTS, PublishedResult
from vit_jax.paper.runner import final_value, git_commit, load_or_train
from vit_jax.paper.runs import ExperimentRun, init_chain, repeat_over_seeds, run_digest
from vit_jax.runtime.files import write_atomically
from vit_jax.settings.fields import flatten_config
from vit_jax.sharding.mesh import first_device
from vit_jax.training.program import lower_train_step, make_program
from vit_jax.training.setup import open_sources
from vit_jax.training.task import make_task
from vit_jax.training.teacher import describe_teacher

RECORDS_FILE = 'reproduced.csv'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
  """Our result for a published one. All values are text, as in the CSV."""

  name: str
  accuracy: str  # Percent, the mean over the seeds.
  deviation: str  # The standard deviation over the seeds, or '' for one seed.
  accuracies: str  # Of each seed, joined by spaces.
  seeds: str
  seconds: str  # Of training, of all seeds.
  device: str
  commit: str
  date: str
  examples: str  # Of the training split.
  classes: str
  digest: str  # Of settings and train step.
  data_digest: str  # Of the data and its first batches.
  jax: str  # Its version: another one may lower the step to another text.
  data: str = ''  # The kind of source, with the format of its files: 'folder: of .jpg files'.


def list_statuses(out: Path) -> list[tuple[str, PublishedResult, str]]:
  """Return (name, result, status) of every published result, with the records in `out`."""
  records = read_records(out)
  return [
    (name, result, describe_status(name, result, records.get(name)))
    for name, result in PUBLISHED_RESULTS.items()
  ]


def describe_status(name: str, result: PublishedResult, record: Record | None) -> str:
  """Return 'matched', 'missed by x', 'stale', 'not run', or 'not runnable here' with its reason."""
  if record is None:
    missing = explain_missing(result)
    return f'not runnable here: {missing}' if missing else 'not run'
  text = f'{format_verdict(result, record)} ({record.device}, commit {record.commit})'
  stale = explain_stale(result, record)
  return f'stale: {stale}; it was {text}' if stale else text


def points_missed(result: PublishedResult, record: Record) -> float:
  """Return how far a record is below the target and its tolerance. Up to 0 it is matched."""
  return result.target - result.tolerance - float(record.accuracy)


def format_verdict(result: PublishedResult, record: Record) -> str:
  """Return 'matched: 91.20 ± 0.10 %' or 'missed by 0.30: 90.50 %'."""
  missed = points_missed(result, record)
  verdict = 'matched' if missed <= 0 else f'missed by {missed:.2f}'
  deviation = f' ± {record.deviation}' if record.deviation else ''
  return f'{verdict}: {record.accuracy}{deviation} %'


def explain_missing(result: PublishedResult) -> str:
  """Return what this machine lacks for a result, or ''."""
  if result.make_run is None:
    return result.needs
  platform = jax.default_backend()
  if result.device != platform:
    return f'its budget is for a {result.device.upper()}, and this machine has a {platform.upper()}'
  config = build_config(result)
  try:
    open_sources(config)
  except UserError as error:
    return one_line(error)
  init = result.make_run().init
  if init and isinstance(init, str) and not Path(init).exists():
    return f'{init} does not exist'
  return ''


def explain_stale(result: PublishedResult, record: Record) -> str:
  """Return what has changed since a record was made, or '' if nothing has."""
  if result.make_run is None or result.device != jax.default_backend():
    return ''
  if record.seeds != ' '.join(map(str, result.seeds)):
    return 'the seeds are not those of the record'
  config = build_config(result)
  digest = digest_program(config, int(record.examples), int(record.classes))
  if digest == record.digest:
    return '' if explain_missing(result) else _explain_other_data(config, record)
  if record.jax != jax.__version__:
    return f'it was made with JAX {record.jax}, and this is {jax.__version__}'
  return 'the settings or the train step are not those of the record'


def _explain_other_data(config: Config, record: Record) -> str:
  is_equal = digest_data(config) == record.data_digest
  return '' if is_equal else 'the data or its augmentation are not those of the record'


def build_config(result: PublishedResult) -> Config:
  """Return the config of the first seed of a result.

  A digest stands for the run that it starts from.
  """
  (run,) = seed_runs(result)[:1]
  return run.build_config(run_digest(run.init) if isinstance(run.init, ExperimentRun) else run.init)


def seed_runs(result: PublishedResult) -> list[ExperimentRun]:
  """Return the run of each seed of a result."""
  return repeat_over_seeds([result.make_run()], result.seeds)


def digest_program(config: Config, examples: int, classes: int) -> str:
  """Return a hash of the settings that are not at their default, and of the lowered train step.

  The step is that of one device. Each example has one label. So a new setting, which is at its
  default, makes no record stale.
  """
  ignored = MUTABLE_ON_RESUME - {'data.eval_batch'}  # It may change the last digits.
  defaults = flatten_config(Config())
  settings = {
    name: value
    for name, value in flatten_config(config).items()
    if name not in ignored and value != defaults[name]
  }
  program = make_program(
    config,
    make_task(config),
    examples=examples,
    classes=classes,
    label_slots=1,
    devices=first_device(),
    teacher=describe_teacher(config, classes),
  )
  text = json.dumps(settings, sort_keys=True) + lower_train_step(program).as_text()
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest_data(config: Config) -> str:
  """Return a hash of the data of a run and of its first batches, augmented and for evaluation."""
  train, evaluation = open_sources(config)
  digest = hashlib.sha256(json.dumps(fingerprint_data(train, evaluation), sort_keys=True).encode())
  data = dataclasses.replace(config.data, workers=0)
  batches = train_batches(
    train, data, seed=config.seed, start=0, host=0, hosts=1, model=config.model
  )
  steps = eval_preprocessing(data, config.model)
  evaluated = eval_batches(evaluation, data, host=0, hosts=1, exact=True, steps=steps)
  for batch in (next(batches), next(evaluated)):
    for name in ('image', 'label', 'id'):
      digest.update(batch[name].tobytes())
  return digest.hexdigest()[:12]


def reproduce(name: str, *, root: Path, out: Path) -> Record:
  """Train the runs of a published result, and return and write its record.

  Complete runs are not repeated, and an interrupted one continues. Raises UserError if there is no
  such result, or if it does not run here.
  """
  if name not in PUBLISHED_RESULTS:
    raise UserError(f'reproduce {name}: no such result.{did_you_mean(name, PUBLISHED_RESULTS)}')
  result = PUBLISHED_RESULTS[name]
  if missing := explain_missing(result):
    raise UserError(f'reproduce {name}: not runnable here: {missing}')
  config = build_config(result)
  train, _ = open_sources(config)
  results = [_train_chain(run, root) for run in seed_runs(result)]
  accuracies = [100 * final_value(each, 'accuracy') for each in results]
  deviation = f'{statistics.stdev(accuracies):.2f}' if len(accuracies) > 1 else ''
  record = Record(
    name=name,
    accuracy=f'{statistics.mean(accuracies):.2f}',
    deviation=deviation,
    accuracies=' '.join(f'{accuracy:.2f}' for accuracy in accuracies),
    seeds=' '.join(map(str, result.seeds)),
    seconds=f'{3600 * sum(each["hours"] for each in results):.0f}',
    device=results[0]['device'],
    commit=git_commit(),
    date=time.strftime('%Y-%m-%d'),
    examples=str(len(train)),
    classes=str(train.classes),
    digest=digest_program(config, len(train), train.classes),
    data_digest=digest_data(config),
    jax=jax.__version__,
    data=describe_source(config, train),
  )
  write_record(record, out)
  return record


def describe_source(config: Config, source: Source) -> str:
  """Return what the images were read from: 'tfds:cifar10', or 'folder: of .jpg files'.

  JPEG copies of a data set lower the accuracy a little. The path of a folder is left out.
  """
  kind = config.data.train.partition(':')[0]
  if not source.is_user_file(0):
    return config.data.train
  return f'{kind}: of {Path(source[0][2]).suffix.lower()} files'


def _train_chain(run: ExperimentRun, root: Path) -> dict:
  """Return the result of a run, after those that it starts from."""
  return [load_or_train(each, root) for each in init_chain(run)][-1]


def read_records(out: Path) -> dict[str, Record]:
  """Return {name: record} of the CSV in `out`. Raises UserError if it has other columns."""
  path = out / RECORDS_FILE
  if not path.is_file():
    return {}
  with path.open(newline='', encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  try:
    return {row['name']: Record(**row) for row in rows}
  except (TypeError, KeyError) as error:
    raise UserError(f'{path} is not a file of `vit-jax reproduce`: {error}') from None


def write_record(record: Record, out: Path):
  """Write a record into the CSV in `out`, in place of an earlier one of this name."""
  records = read_records(out) | {record.name: record}
  text = io.StringIO()
  names = [field.name for field in dataclasses.fields(Record)]
  writer = csv.DictWriter(text, names, lineterminator='\n')
  writer.writeheader()
  writer.writerows(dataclasses.asdict(records[name]) for name in sorted(records))
  out.mkdir(parents=True, exist_ok=True)
  write_atomically(out / RECORDS_FILE, text.getvalue())
