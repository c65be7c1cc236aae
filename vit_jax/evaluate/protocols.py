"""Evaluation protocols by name, such as 'fewshot:builtin:digits': a protocol and a source.

The same protocols evaluate the parameters of a run (`config.probes`) and a finished model
(`evaluate --protocol`). Those on frozen features are in probes.py, those with label sets in
label_sets.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import PurePath

from vit_jax.data.sources import Source
from vit_jax.errors import UserError, did_you_mean
from vit_jax.evaluate import label_sets, probes
from vit_jax.evaluate.evaluator import Evaluator, PreemptedError
from vit_jax.evaluate.probes import ProbeOptions, Score

_PROTOCOL_NAMES = (*probes.PROBES, *label_sets.LABEL_SET_SOURCES)


@dataclasses.dataclass(frozen=True, slots=True)
class ProtocolResult:
  """The result of one protocol on one source."""

  protocol: str
  data: str
  scores: dict[str, Score]  # By name: '5shot', '20nn', 'linear', 'top1', …
  examples: int  # Of the test split.
  pool_examples: int = 0  # Labelled examples that a probe is fitted to, or samples from.
  skipped: int = 0  # Images without a correct label.


# (evaluator, parameters) -> results.
ProtocolFn = Callable[[Evaluator, dict], list[ProtocolResult]]


def make_probe_protocol(
  protocols: Sequence[str], data: str, pool: Source, test: Source, options: ProbeOptions
) -> ProtocolFn:
  """Return the function that runs several probes on the features of one source.

  Features are computed once for all of them. Raises UserError if `pool` has fewer examples than
  neighbours are needed.
  """
  if 'knn' in protocols and options.k > len(pool):
    raise UserError(f'knn on {data}: there are {len(pool)} examples, fewer than k={options.k}')

  def evaluate(evaluator: Evaluator, params: dict) -> list[ProtocolResult]:
    features = probes.extract_probe_features(evaluator, params, pool, test)
    sizes = {'examples': len(features.test_labels), 'pool_examples': len(features.train_labels)}
    return [
      ProtocolResult(name, data, probes.PROBES[name](features, options), **sizes)
      for name in protocols
    ]

  return evaluate


def make_label_set_protocol(
  protocol: str,
  data: str,
  *,
  labels: tuple[str, ...],
  classes: int,
  source: str = 'the model',
  **where: str,
) -> ProtocolFn:
  """Return the function that evaluates one test set of label_sets.py.

  Args:
    protocol: Which test set.
    data: The source of its images; '' for the default.
    labels: The names of the model's logits, or ().
    classes: The number of logits.
    source: The name of the model in messages.
    **where: Keywords of `open_label_set_benchmark`.

  Raises UserError if the data are missing, or if the model lacks one of the classes.
  """
  benchmark = label_sets.open_label_set_benchmark(protocol, data, **where)
  logit_indices = benchmark.match_logits(labels, classes=classes, source=source)
  title = data or label_sets.LABEL_SET_SOURCES[protocol][0]

  def evaluate(evaluator: Evaluator, params: dict) -> list[ProtocolResult]:
    counts = label_sets.evaluate_label_set(evaluator, params, benchmark, logit_indices)
    correct = {'top1': counts.correct, 'top5': counts.correct_top5}
    scores = {name: Score(count / max(1, counts.examples)) for name, count in correct.items()}
    return [ProtocolResult(protocol, title, scores, counts.examples, skipped=counts.skipped)]

  return evaluate


def make_protocols(
  entries: Sequence[str], labels: tuple[str, ...], *, dir: str, l2: float
) -> ProtocolFn:
  """Return the function that runs all of `config.probes` for a model with these class names.

  Raises UserError if an entry has an unknown protocol, or if its data are missing.
  """
  parsed = [parse_protocol(entry) for entry in entries]
  prefixes = [metric_prefix(*each) for each in parsed]
  if repeated := {name for name in prefixes if prefixes.count(name) > 1}:
    raise UserError(
      f'config.probes={tuple(entries)}: several entries would be recorded as {min(repeated)}'
    )
  functions, probes_of_source = [], {}
  for protocol, data in parsed:
    if protocol in probes.PROBES:
      probes_of_source.setdefault(data, []).append(protocol)
    else:
      functions.append(
        make_label_set_protocol(protocol, data, labels=labels, classes=len(labels), dir=dir)
      )
  for data, names in probes_of_source.items():
    pool, test = probes.open_pool_and_test(data, dir=dir)
    functions.append(make_probe_protocol(names, data, pool, test, ProbeOptions(l2=l2)))
  return lambda evaluator, params: [x for each in functions for x in each(evaluator, params)]


def parse_protocol(entry: str) -> tuple[str, str]:
  """Split an entry of `config.probes`: 'fewshot:builtin:digits' -> ('fewshot', 'builtin:digits').

  Raises UserError if the protocol is unknown, or if it needs a source and the entry has none.
  """
  protocol, _, data = entry.partition(':')
  if protocol not in _PROTOCOL_NAMES:
    hint = did_you_mean(protocol, _PROTOCOL_NAMES)
    raise UserError(f'config.probes: {entry!r} does not start with a known protocol.{hint}')
  if not data and protocol in probes.PROBES:
    raise UserError(
      f'config.probes: {entry!r} has no source: expected {protocol}:SOURCE, '
      f'such as {protocol}:builtin:digits'
    )
  return protocol, data


def metric_prefix(protocol: str, data: str) -> str:
  """Return the prefix of the names of metrics: 'fewshot/digits', 'real/imagenet2012'."""
  data = data or label_sets.LABEL_SET_SOURCES[protocol][0]
  return f'{protocol}/{PurePath(data.partition(":")[2].partition(":")[0]).name}'


def results_to_metrics(results: Sequence[ProtocolResult]) -> dict[str, float]:
  """Return the accuracies by the names of a run's records: {'fewshot/digits_5shot': 0.9, …}."""
  return {
    f'{metric_prefix(each.protocol, each.data)}_{name}': score.accuracy
    for each in results
    for name, score in each.scores.items()
  }


def make_protocol_evaluator(
  run_protocols: ProtocolFn, evaluator: Evaluator
) -> Callable[[dict], dict[str, float] | None]:
  """Return the function params -> metrics. It returns None if the run has to stop."""

  def evaluate(params: dict) -> dict[str, float] | None:
    try:
      return results_to_metrics(run_protocols(evaluator, params))
    except PreemptedError:
      return None

  return evaluate
