"""The command `evaluate`: evaluate a model on a complete split."""

import dataclasses
import json
import math

from vit_jax.cli.arguments import (
  PREPROCESSING_FLAGS,
  SOURCE_KINDS,
  add_batch_flag,
  add_model_flags,
  eval_batch_size,
  load_model,
  model_overrides,
  non_negative_int,
)
from vit_jax.cli.protocols import (
  add_protocol_flags,
  check_protocol_flags,
  data_options,
  evaluate_protocols,
  explain_bad_images,
  image_progress_bar,
)
from vit_jax.cli.report import evaluation_report_path, write_evaluation_report
from vit_jax.cli.results import (
  STDOUT,
  check_output_paths,
  format_csv,
  format_table,
  write_output,
)
from vit_jax.cli.vtab import add_vtab_flags, evaluate_vtab
from vit_jax.errors import UserError
from vit_jax.runtime.screen import print_stderr

_STATISTICS = {  # Names in JSON -> names on the screen.
  'macro_f1': 'macro F1',
  'mean_average_precision': 'mAP',
  'expected_calibration_error': 'ECE',
}


def evaluate(args):
  """Evaluate a model on every example of a split, or with the protocols of --protocol."""
  check_output_paths(per_class=args.per_class, confusion=args.confusion, json=args.json)
  if args.report:
    check_output_paths(report=str(evaluation_report_path(args.report)))
  check_protocol_flags(args)
  functions = {'classify': _evaluate_classifier, 'vtab': evaluate_vtab}
  functions.get(args.protocol[0], evaluate_protocols)(args)


def _evaluate_classifier(args):
  """Evaluate the model's own head."""
  from vit_jax.data.class_names import match_classes
  from vit_jax.data.sources import open_source
  from vit_jax.evaluate.classify import classification_statistics
  from vit_jax.evaluate.predict import check_trained_head

  source = open_source(args.data, args.split, dir=args.dir)
  if args.confusion:
    _check_confusion_plot(args, source)
  model = load_model(args)
  check_trained_head(model)
  if _is_published_split(source) and model.preprocessing.orient == 'auto':
    # Published accuracies are of pipelines that ignore the orientation.
    steps = dataclasses.replace(model.preprocessing, orient='ignore')
    model = dataclasses.replace(model, preprocessing=steps)
  logit_indices, notes = match_classes(
    source.label_names, model.labels, classes=model.classes, source=model.source
  )
  notes += _warn_about_preprocessing(args, model)
  for note in notes:
    print_stderr(note)
  result = _run_evaluation(args, model, source, logit_indices)
  facts = summarize(model, args, source, result) | classification_statistics(result, model.loss)
  facts |= {'notes': [*model.notes, *notes]}
  if args.json != STDOUT:
    print(format_summary(facts), end='')
  write_output(json.dumps(facts, indent=1) + '\n', args.json)
  title = f'{model.source} on {args.data} {source.split}: accuracy {result.accuracy:.2%}'
  _write_class_reports(args, source, result, title=title)
  if args.report:
    write_evaluation_report(args.report, model, source, result, facts)


def _is_published_split(source) -> bool:
  """Return whether published accuracies refer to the split."""
  from vit_jax.data.class_names import is_imagenet_validation

  return is_imagenet_validation(
    source.label_names, examples=len(source), max_labels=source.max_labels
  )


def _check_confusion_plot(args, source):
  """Check that a confusion matrix of the data can be drawn."""
  from vit_jax.evaluate.confusion import MAX_CONFUSION_CLASSES

  if args.confusion == STDOUT:
    raise UserError('--confusion - : a picture needs a file, such as confusion.png')
  if source.max_labels > 1:
    raise UserError(
      f'--confusion: examples of {args.data} have up to {source.max_labels} labels, '
      'and a confusion matrix needs exactly one'
    )
  if source.classes > MAX_CONFUSION_CLASSES:
    raise UserError(
      f'--confusion: a picture can show {MAX_CONFUSION_CLASSES:,} classes, and {args.data} has '
      f'{source.classes:,}; --per_class lists them'
    )


def _warn_about_preprocessing(args, model) -> list[str]:
  """Return a warning for each preprocessing flag that differs from the model's own setting."""
  from vit_jax.pretrained.loading import load

  overrides = model_overrides(args)
  changed = overrides.keys() & set(PREPROCESSING_FLAGS)
  if not changed:
    return []
  others = {name: value for name, value in overrides.items() if name not in changed}
  try:
    own = load(args.init, **others)
  except UserError:  # The model cannot be loaded without these flags.
    return []
  warnings = []
  if own.preprocessing.resize_size is None:
    changed -= {'short_side'}
  for name in changed:
    key = {'std': 'scale', 'short_side': 'resize_size'}.get(name, name)
    value, own_value = (
      _format_flag(name, getattr(each.preprocessing, key)) for each in (model, own)
    )
    origin = 'files of this kind usually have' if key in own.assumed else "the model's own is"
    if value != own_value:
      warnings.append(f'warning: {name} {value}, where {origin} {own_value}')
  return sorted(warnings)


def _format_flag(name: str, value) -> str:
  """Return a preprocessing setting as its flag takes it."""
  if name in ('mean', 'std'):
    return ','.join(f'{each / 255:.4g}' for each in value)
  if name == 'short_side':
    return str(min(value))
  return ','.join(map(str, value)) if name == 'size' else str(value)


def _run_evaluation(args, model, source, logit_indices):
  """Return the ClassificationResult."""
  from vit_jax.evaluate.classify import evaluate_split
  from vit_jax.evaluate.evaluator import make_pretrained_evaluator
  from vit_jax.evaluate.predict import eval_data_config

  batch = eval_batch_size(args)
  data = eval_data_config(model, batch=batch, **data_options(args))
  with image_progress_bar(len(source)) as bar, explain_bad_images():
    evaluator, params = make_pretrained_evaluator(
      model, data, on_batch=lambda examples: bar.update(min(examples, bar.total - bar.n))
    )
    return evaluate_split(evaluator, params, source, loss=model.loss, logit_indices=logit_indices)


def summarize(model, args, source, result) -> dict:
  """Return the result for JSON and for the screen, with a published accuracy if there is one."""
  facts = {
    'model': model.source,
    'data': args.data,
    'split': source.split,
    'accuracy': result.accuracy,
    'accuracy_top5': result.accuracy_top5,
    'loss': result.loss,
    'examples': result.examples,
    'classes': source.classes,
    'skipped': result.skipped,
    'images_per_second': result.images_per_second,
    'preprocessing': model.preprocessing.to_dict(),
  }
  if model.accuracy is not None and _is_published_split(source):
    facts |= {'expected_accuracy': model.accuracy / 100, 'expected_from': model.accuracy_from}
  return facts


def format_summary(facts: dict) -> str:
  """Return the lines that are printed."""
  expected = interval = ''
  if 'accuracy_low' in facts:
    interval = f'  ({facts["accuracy_low"]:.2%} to {facts["accuracy_high"]:.2%}, 95 % confidence)'
  if 'expected_accuracy' in facts:
    expected = f'  expected {facts["expected_accuracy"]:.2%} ({facts["expected_from"]})'
  skipped = f'  and {facts["skipped"]:,} that could not be read' if facts['skipped'] else ''
  lines = [
    f'{facts["model"]} on {facts["data"]} {facts["split"]}, {facts["classes"]:,} classes',
    f'accuracy  {facts["accuracy"]:8.2%}{interval}{expected}',
    f'top 5     {facts["accuracy_top5"]:8.2%}',
    *(f'{title:9} {facts[name]:8.2%}' for name, title in _STATISTICS.items() if name in facts),
    f'loss      {facts["loss"]:8.4f}',
    f'examples  {facts["examples"]:8,}{skipped}',
    f'images/s  {facts["images_per_second"]:8,.1f}',
  ]
  return '\n'.join(lines) + '\n'


def _write_class_reports(args, source, result, *, title: str):
  """Write the table of classes and the confusion matrix, if they are requested."""
  from vit_jax.evaluate.classify import class_table
  from vit_jax.evaluate.confusion import confusion_matrix, plot_confusion_matrix

  names = source.label_names
  if args.per_class:
    columns = class_table(result, names)
    is_table = args.per_class == STDOUT
    text = _format_class_table(columns) if is_table else _format_class_csv(columns)
    write_output(text, args.per_class)
  if args.confusion:
    matrix = confusion_matrix(result.labels, result.predictions, source.classes)
    plot_confusion_matrix(matrix, names, args.confusion, title=title)


def _format_class_csv(columns: dict[str, list]) -> str:
  """Return CSV lines. A ratio without examples is empty."""

  def cell(value) -> str:
    return ('' if math.isnan(value) else f'{value:.6g}') if isinstance(value, float) else value

  rows = zip(*columns.values(), strict=True)
  return format_csv([columns, *([cell(value) for value in row] for row in rows)])


def _format_class_table(columns: dict[str, list]) -> str:
  """Return a table with the worst class first. Classes without examples are last."""

  def cell(value) -> str:
    if isinstance(value, float):
      return '-' if math.isnan(value) else f'{value:.2%}'
    return value if isinstance(value, str) else f'{value:,}'

  accuracy = list(columns).index('accuracy')
  rows = zip(*columns.values(), strict=True)
  worst_first = sorted(rows, key=lambda row: (math.isnan(row[accuracy]), row[accuracy]))
  return format_table([tuple(columns), *(tuple(map(cell, row)) for row in worst_first)])


def add(commands):
  """Add the parser of the command."""
  command = commands.add_parser('evaluate', help=evaluate.__doc__, description=evaluate.__doc__)
  command.set_defaults(function=evaluate)
  command.add_argument('--data', metavar='NAME', help=f'source: {SOURCE_KINDS}')
  command.add_argument(
    '--split', default='', help='split (default: the first that exists of test, validation, val)'
  )
  command.add_argument(
    '--dir', default='', help="directory of TFDS data sets (default: $TFDS_DATA_DIR, or TFDS's own)"
  )
  add_batch_flag(command)
  command.add_argument(
    '--workers',
    type=non_negative_int,
    default=0,
    help='processes that load images; 0: threads',
  )
  command.add_argument(
    '--threads',
    type=non_negative_int,
    default=0,
    help='threads that load images in each process; 0: chosen from the number of cores',
  )
  command.add_argument(
    '--bad_images',
    default='error',
    choices=('error', 'skip'),
    help='error: stop at an image that cannot be read; skip: leave it out and count it',
  )
  command.add_argument(
    '--per_class',
    metavar='FILE',
    help='write accuracy, precision and F1 of each class as CSV; - prints a table',
  )
  command.add_argument('--confusion', metavar='PNG', help='write the confusion matrix as a picture')
  command.add_argument(
    '--json', metavar='FILE', help='write the result as a JSON object; - prints it instead of text'
  )
  command.add_argument(
    '--report',
    metavar='FILE',
    help='write a page about classes, mistakes and attention to a file or into a directory',
  )
  add_protocol_flags(command)
  add_vtab_flags(command)
  add_model_flags(command)
