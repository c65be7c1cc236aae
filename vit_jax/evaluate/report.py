"""A whole split through a pre-trained model: exact accuracy, by class too, and what is taken for what.

Shapes: b batch, m labels of an example, k classes of the model.
"""

import csv
import dataclasses
import functools
import io
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.loader import eval_batches
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.evaluate.classify import classify, count
from vit_jax.losses import LOSSES
from vit_jax.mesh import everywhere, make_mesh, rows, to_global
from vit_jax.pretrained.labels import class_names, synsets

MATRIX = 4096  # Classes: a larger confusion matrix is nobody's picture.


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
  """`result` as `classify` gives it, and of every single-labelled example: [k] right, [k] seen, [k, k] true by predicted."""

  result: dict[str, float]
  seconds: float
  correct: np.ndarray
  seen: np.ndarray
  confusion: np.ndarray | None


def match_classes(model, source: Source) -> tuple[np.ndarray, str]:
  """(the model's class for each of the source's classes, what is to be said of it).

  The source may have the model's classes in another order, or some of them, or call ImageNet's by their synsets. UserError
  that names what differs.
  """
  theirs, ours = source.label_names, model.labels
  for which in ('imagenet1k', 'imagenet21k'):
    if ours == class_names(which) and set(theirs) <= set(synsets(which)):
      ours = synsets(which)
  if not ours:
    if len(theirs) != model.classes:
      raise UserError(f'{model.source} has {model.classes} classes and no names for them, the data {len(theirs)}')
    return np.arange(model.classes), f'{model.source} has no names for its classes: they are taken in the order of the data'
  place = {name: i for i, name in enumerate(ours)}
  if unknown := [name for name in theirs if name not in place]:
    unseen = [name for name in ours if name not in set(theirs)]
    raise UserError(f'the classes differ: only the data has {unknown[:3]}, only {model.source} has {unseen[:3]}')
  said = '' if len(theirs) == len(ours) else f'the data has {len(theirs)} of the {len(ours):,} classes; a prediction may be any'
  return np.array([place[name] for name in theirs]), said


def evaluate(model, source: Source, data: DataConfig) -> Report:
  """The model on every example of the source, once, over all devices; images unrounded, as released models were measured."""
  began = time.monotonic()
  mapping, k = match_classes(model, source)[0], model.classes
  mesh = make_mesh(1, batches={'--batch': data.eval_batch})
  predict = lambda params, images: model.model.apply({'params': params}, images)

  def step(params, batch):
    logits = predict(params, batch['image'])
    counts = count(params, batch, predict=lambda *_: logits, loss=functools.partial(LOSSES[model.loss], smoothing=0.0))
    return counts, {'predicted': logits.argmax(axis=-1), 'label': batch['label'], 'mask': batch['mask']}

  step = jax.jit(step, in_shardings=(everywhere(mesh), rows(mesh)), out_shardings=everywhere(mesh))
  params = jax.device_put(model.params, everywhere(mesh))
  counted, correct, seen = [], np.zeros(k, int), np.zeros(k, int)
  confusion = np.zeros((k, k), int) if k <= MATRIX else None
  hosts = {'host': jax.process_index(), 'hosts': jax.process_count()}
  for batch in eval_batches(source, data, exact=True, **hosts):
    batch = batch | {'label': np.where(batch['label'] >= 0, mapping[batch['label']], -1).astype(np.int32)}
    counts, each = step(params, to_global(batch, mesh))
    counted.append(counts)
    each = jax.device_get(each)
    single = each['mask'] & ((each['label'] >= 0).sum(axis=1) == 1)
    true, predicted = each['label'][single].max(axis=1), each['predicted'][single]
    np.add.at(seen, true, 1)
    np.add.at(correct, true[true == predicted], 1)
    if confusion is not None:
      np.add.at(confusion, (true, predicted), 1)
  return Report(classify(counted), time.monotonic() - began, correct, seen, confusion)


def per_class(report: Report, names: tuple[str, ...]) -> str:
  """CSV: class, examples, correct, accuracy; the classes that occur. UserError where examples have several labels."""
  refuse_several_labels(report)
  out = io.StringIO()
  table = csv.writer(out, lineterminator='\n')
  table.writerow(['class', 'examples', 'correct', 'accuracy'])
  for i in np.flatnonzero(report.seen):
    table.writerow([names[i], report.seen[i], report.correct[i], f'{report.correct[i] / report.seen[i]:.4f}'])
  return out.getvalue()


def refuse_several_labels(report: Report):
  """UserError where not every example has one label."""
  if report.seen.sum() != report.result['examples']:
    several = report.result['examples'] - report.seen.sum()
    raise UserError(f'{several:,} examples have several labels: accuracy by class is not defined for them')


def draw_confusion(report: Report, names: tuple[str, ...], path: Path):
  """A picture of the confusion matrix: rows are the classes that occur, shares of a row as colours, and numbers where there is
  room. UserError where examples have several labels, or there are too many classes."""
  import matplotlib.figure

  refuse_several_labels(report)
  if report.confusion is None:
    raise UserError(f'{len(report.seen):,} classes are too many for a confusion matrix: {MATRIX:,} is the most')
  true = np.flatnonzero(report.seen)
  predicted = np.flatnonzero(report.confusion.any(axis=0) | (report.seen > 0))
  shares = report.confusion[np.ix_(true, predicted)] / report.seen[true, None]
  few = max(shares.shape) <= 40
  side = min(30, 3 + 0.45 * max(shares.shape)) if few else 12
  figure = matplotlib.figure.Figure(figsize=(side + 1, side), layout='constrained', dpi=100)
  axes = figure.add_subplot()
  image = axes.imshow(shares, vmin=0, vmax=1, cmap='Blues', interpolation='nearest')
  axes.set(xlabel='predicted', ylabel='true')
  if few:
    axes.set_xticks(range(len(predicted)), [names[i] for i in predicted], rotation=45, ha='right')
    axes.set_yticks(range(len(true)), [names[i] for i in true])
    for (row, column), share in np.ndenumerate(shares):
      if share:
        axes.text(column, row, f'{100 * share:.0f}', ha='center', va='center', color='white' if share > 0.5 else 'black')
  figure.colorbar(image, ax=axes, label='share of the true class', shrink=0.8)
  figure.savefig(path)


def differences(asked: dict, own: dict) -> Iterable[str]:
  """'size 384x384 instead of 224x224', … for what was asked for otherwise than the model was made with."""
  text = lambda value: 'x'.join(map(str, value)) if isinstance(value, tuple) else str(value)
  for name, value in asked.items():
    if value != own[name]:
      yield f'{name} {text(value)} instead of {text(own[name])}'
