"""An evaluation by its name, 'fewshot:builtin:digits': a protocol and a source of examples, in a run or of a finished model.

Those on frozen features are frozen.py's, those with sets of labels labelsets.py's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import PurePath

from vit_jax.data.sources import Source
from vit_jax.errors import UserError, did_you_mean
from vit_jax.evaluate import frozen, labelsets
from vit_jax.evaluate.frozen import Figure, Options
from vit_jax.evaluate.subject import StoppedError, Subject

NAMES = (*frozen.PROTOCOLS, *labelsets.DEFAULTS)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
  """Of one protocol on one source."""

  protocol: str
  data: str
  figures: dict[str, Figure]  # '5shot', '20nn', 'linear', 'top1', …
  examples: int  # Of the test split.
  pool: int = 0  # Examples that were learned from, or drawn from.
  skipped: int = 0  # Images for which no label is right.


Opened = Callable[
  [Subject, dict], list[Outcome]
]  # A subject and its parameters of the moment -> what comes of it.


def open_frozen(
  protocols: Sequence[str], data: str, pool: Source, test: Source, options: Options
) -> Opened:
  """Those protocols of frozen.py on the features of one source, computed once for all of them."""
  if 'knn' in protocols and options.k > len(pool):
    raise UserError(f'knn on {data}: {options.k} neighbours of the {len(pool)} examples there are')

  def judge(subject: Subject, params: dict) -> list[Outcome]:
    features = frozen.features(subject, params, pool, test)
    sizes = {'examples': len(features.x_test), 'pool': len(features.x)}
    return [
      Outcome(name, data, frozen.PROTOCOLS[name](features, options), **sizes) for name in protocols
    ]

  return judge


def open_label_sets(
  protocol: str,
  data: str,
  *,
  labels: tuple[str, ...],
  classes: int,
  source: str = 'the model',
  **where: str,
) -> Opened:
  """A protocol of labelsets.py for a model whose `classes` logits have these labels. UserError where it lacks one of them."""
  opened = labelsets.open_label_sets(protocol, data, **where)
  columns = opened.columns(labels, classes=classes, source=source)
  title = data or labelsets.DEFAULTS[protocol][0]

  def judge(subject: Subject, params: dict) -> list[Outcome]:
    counted = labelsets.judge(subject, params, opened, columns)
    shares = {'top1': counted.correct, 'top5': counted.correct_top5}
    figures = {name: Figure(right / max(1, counted.examples)) for name, right in shares.items()}
    return [Outcome(protocol, title, figures, counted.examples, skipped=counted.skipped)]

  return judge


def open_all(entries: Sequence[str], labels: tuple[str, ...], *, dir: str, l2: float) -> Opened:
  """All of config.probes, for a model that has these classes. UserError for what names no protocol, or no data that is here."""
  parsed, opened, by_source = [parse(entry) for entry in entries], [], {}
  names = [metric(*each) for each in parsed]
  if twice := {name for name in names if names.count(name) > 1}:
    raise UserError(f'config.probes={tuple(entries)}: several would be recorded as {min(twice)}')
  for protocol, data in parsed:
    if protocol in frozen.PROTOCOLS:
      by_source.setdefault(data, []).append(protocol)
    else:
      opened.append(open_label_sets(protocol, data, labels=labels, classes=len(labels), dir=dir))
  for data, protocols in by_source.items():
    opened.append(
      open_frozen(protocols, data, *frozen.pool_and_test(data, dir=dir), Options(l2=l2))
    )
  return lambda subject, params: [outcome for judge in opened for outcome in judge(subject, params)]


def parse(entry: str) -> tuple[str, str]:
  """'fewshot:builtin:digits' -> ('fewshot', 'builtin:digits'). UserError for what is no entry of config.probes."""
  protocol, _, data = entry.partition(':')
  if protocol not in NAMES:
    raise UserError(f'config.probes: {entry!r} names no protocol.{did_you_mean(protocol, NAMES)}')
  if not data and protocol in frozen.PROTOCOLS:
    raise UserError(
      f'config.probes: {entry!r} names no data: expected {protocol}:SOURCE, such as {protocol}:builtin:digits'
    )
  return protocol, data


def metric(protocol: str, data: str) -> str:
  """'fewshot/digits', 'real/imagenet2012': what the name of a record starts with."""
  data = data or labelsets.DEFAULTS[protocol][0]
  return f'{protocol}/{PurePath(data.partition(":")[2].partition(":")[0]).name}'


def as_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
  """{'fewshot/digits_5shot': 0.9, …}: shares, by the names that a run's records have."""
  return {
    f'{metric(each.protocol, each.data)}_{name}': figure.accuracy
    for each in outcomes
    for name, figure in each.figures.items()
  }


def examiner(judge: Opened, subject: Subject) -> Callable[[dict], dict[str, float] | None]:
  """Parameters -> what config.probes measure of them; None where the run is asked to stop meanwhile."""

  def examine(params: dict) -> dict[str, float] | None:
    try:
      return as_metrics(judge(subject, params))
    except StoppedError:
      return None

  return examine
