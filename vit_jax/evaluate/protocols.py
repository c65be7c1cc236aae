"""An evaluation by its name, 'fewshot:builtin:digits': a protocol and a source of examples, in a run or of a finished model.

Those on frozen features are frozen.py's, those with sets of labels labelsets.py's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import PurePath

from vit_jax.data.sources import Source
from vit_jax.errors import UserError, did_you_mean
from vit_jax.evaluate import label_sets, probes
from vit_jax.evaluate.evaluator import Evaluator, StoppedError
from vit_jax.evaluate.probes import ProbeOptions, Score

_PROTOCOL_NAMES = (*probes.PROBES, *label_sets.LABEL_SET_SOURCES)


@dataclasses.dataclass(frozen=True, slots=True)
class ProtocolResult:
  """Of one protocol on one source."""

  protocol: str
  data: str
  figures: dict[str, Score]  # '5shot', '20nn', 'linear', 'top1', …
  examples: int  # Of the test split.
  pool: int = 0  # Examples that were learned from, or drawn from.
  skipped: int = 0  # Images for which no label is right.


ProtocolFn = Callable[
  [Evaluator, dict], list[ProtocolResult]
]  # A subject and its parameters of the moment -> what comes of it.


def make_probe_protocol(
  protocols: Sequence[str], data: str, pool: Source, test: Source, options: ProbeOptions
) -> ProtocolFn:
  """Those protocols of frozen.py on the features of one source, computed once for all of them."""
  if 'knn' in protocols and options.k > len(pool):
    raise UserError(f'knn on {data}: {options.k} neighbours of the {len(pool)} examples there are')

  def judge(subject: Evaluator, params: dict) -> list[ProtocolResult]:
    features = probes.extract_probe_features(subject, params, pool, test)
    sizes = {'examples': len(features.x_test), 'pool': len(features.x)}
    return [
      ProtocolResult(name, data, probes.PROBES[name](features, options), **sizes)
      for name in protocols
    ]

  return judge


def make_label_set_protocol(
  protocol: str,
  data: str,
  *,
  labels: tuple[str, ...],
  classes: int,
  source: str = 'the model',
  **where: str,
) -> ProtocolFn:
  """A protocol of labelsets.py for a model whose `classes` logits have these labels. UserError where it lacks one of them."""
  opened = label_sets.open_label_set_benchmark(protocol, data, **where)
  columns = opened.columns(labels, classes=classes, source=source)
  title = data or label_sets.LABEL_SET_SOURCES[protocol][0]

  def judge(subject: Evaluator, params: dict) -> list[ProtocolResult]:
    counted = label_sets.evaluate_label_set(subject, params, opened, columns)
    shares = {'top1': counted.correct, 'top5': counted.correct_top5}
    figures = {name: Score(right / max(1, counted.examples)) for name, right in shares.items()}
    return [ProtocolResult(protocol, title, figures, counted.examples, skipped=counted.skipped)]

  return judge


def make_protocols(
  entries: Sequence[str], labels: tuple[str, ...], *, dir: str, l2: float
) -> ProtocolFn:
  """All of config.probes, for a model that has these classes. UserError for what names no protocol, or no data that is here."""
  parsed, opened, by_source = [parse_protocol(entry) for entry in entries], [], {}
  names = [metric_prefix(*each) for each in parsed]
  if twice := {name for name in names if names.count(name) > 1}:
    raise UserError(f'config.probes={tuple(entries)}: several would be recorded as {min(twice)}')
  for protocol, data in parsed:
    if protocol in probes.PROBES:
      by_source.setdefault(data, []).append(protocol)
    else:
      opened.append(
        make_label_set_protocol(protocol, data, labels=labels, classes=len(labels), dir=dir)
      )
  for data, protocols in by_source.items():
    opened.append(
      make_probe_protocol(
        protocols, data, *probes.open_pool_and_test(data, dir=dir), ProbeOptions(l2=l2)
      )
    )
  return lambda subject, params: [outcome for judge in opened for outcome in judge(subject, params)]


def parse_protocol(entry: str) -> tuple[str, str]:
  """'fewshot:builtin:digits' -> ('fewshot', 'builtin:digits'). UserError for what is no entry of config.probes."""
  protocol, _, data = entry.partition(':')
  if protocol not in _PROTOCOL_NAMES:
    raise UserError(
      f'config.probes: {entry!r} names no protocol.{did_you_mean(protocol, _PROTOCOL_NAMES)}'
    )
  if not data and protocol in probes.PROBES:
    raise UserError(
      f'config.probes: {entry!r} names no data: expected {protocol}:SOURCE, such as {protocol}:builtin:digits'
    )
  return protocol, data


def metric_prefix(protocol: str, data: str) -> str:
  """'fewshot/digits', 'real/imagenet2012': what the name of a record starts with."""
  data = data or label_sets.LABEL_SET_SOURCES[protocol][0]
  return f'{protocol}/{PurePath(data.partition(":")[2].partition(":")[0]).name}'


def results_to_metrics(outcomes: Sequence[ProtocolResult]) -> dict[str, float]:
  """{'fewshot/digits_5shot': 0.9, …}: shares, by the names that a run's records have."""
  return {
    f'{metric_prefix(each.protocol, each.data)}_{name}': figure.accuracy
    for each in outcomes
    for name, figure in each.figures.items()
  }


def make_protocol_evaluator(
  judge: ProtocolFn, subject: Evaluator
) -> Callable[[dict], dict[str, float] | None]:
  """Parameters -> what config.probes measure of them; None where the run is asked to stop meanwhile."""

  def examine(params: dict) -> dict[str, float] | None:
    try:
      return results_to_metrics(judge(subject, params))
    except StoppedError:
      return None

  return examine
