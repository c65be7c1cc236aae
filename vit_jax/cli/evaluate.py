"""evaluate: a model on a whole split."""

import functools
import json
import sys

from vit_jax.cli.arguments import (
  PREPROCESSING,
  add_batch,
  add_model,
  batch_size,
  load_model,
  overrides,
  whole,
)
from vit_jax.cli.protocols import add_protocol, examine, refuse_misplaced
from vit_jax.cli.results import STDOUT, check_output_paths, format_csv, format_table, write_output
from vit_jax.cli.vtab import add_vtab, vtab
from vit_jax.errors import UserError
from vit_jax.runtime.cluster import print_stderr

COLUMNS = ('class', 'examples', 'correct', 'accuracy')


def evaluate(args):
  """Exact accuracy and loss over a whole split: every example once, on all devices. Or what --protocol says."""
  check_output_paths(per_class=args.per_class, confusion=args.confusion, json=args.json)
  refuse_misplaced(args)
  {'classify': classify, 'vtab': vtab}.get(args.protocol[0], examine)(args)


def classify(args):
  """A model's own head."""
  from vit_jax.data.sources import open_source

  source = open_source(args.data, args.split, dir=args.dir)
  if args.confusion:
    refuse_picture(args, source)
  from vit_jax.data.class_names import match_classes
  from vit_jax.evaluate.predict import check_trained_head

  model = load_model(args)
  check_trained_head(model)
  columns, notes = match_classes(
    source.label_names, model.labels, classes=model.classes, source=model.source
  )
  notes += other_preprocessing(args, model)
  for note in notes:
    print_stderr(note)
  result = run(args, model, source, columns)
  facts = summary(model, args, source, result) | {'notes': [*model.notes, *notes]}
  if args.json != STDOUT:
    print(in_words(facts), end='')
  write_output(json.dumps(facts, indent=1) + '\n', args.json)
  report(
    args,
    source,
    result,
    title=f'{model.source} on {args.data} {source.split}: {result.accuracy:.2%} right',
  )


def refuse_picture(args, source):
  """UserError where no confusion matrix can be drawn of the data."""
  from vit_jax.evaluate.confusion import MAX_CONFUSION_CLASSES

  if args.confusion == STDOUT:
    raise UserError('--confusion - : a picture goes to a file, such as confusion.png')
  if source.max_labels > 1:
    raise UserError(
      f'--confusion: examples of {args.data} have up to {source.max_labels} labels, and a matrix wants one'
    )
  if source.classes > MAX_CONFUSION_CLASSES:
    raise UserError(
      f'--confusion: a picture can show {MAX_CONFUSION_CLASSES:,} classes, and {args.data} has {source.classes:,}; --per_class lists them'
    )


def other_preprocessing(args, model) -> list[str]:
  """A warning for each thing that was asked for and is not what the model itself has."""
  from vit_jax.pretrained.loading import load

  asked = overrides(args)
  if not asked.keys() & set(PREPROCESSING):
    return []
  try:
    own = load(
      args.init, **{name: value for name, value in asked.items() if name not in PREPROCESSING}
    )
  except UserError:  # It cannot be read without what was asked for.
    return []
  out = []
  for name in asked.keys() & set(PREPROCESSING):
    key = 'scale' if name == 'std' else name
    now, then = (plain(name, each.preprocessing[key]) for each in (model, own))
    whose = 'files of this kind usually have' if key in own.assumed else "the model's own is"
    if now != then and (name != 'short_side' or own.preprocessing['crop'] == 'center'):
      out.append(f'warning: {name} {now}, where {whose} {then}')
  return sorted(out)


def plain(name: str, value) -> str:
  """As its flag takes it."""
  if name in ('mean', 'std'):
    return ','.join(f'{each / 255:.4g}' for each in value)
  return ','.join(map(str, value)) if name == 'size' else str(value)


def run(args, model, source, columns):
  """The Evaluation. UserError where an image cannot be read, unless such are to be left out."""
  import tqdm

  from vit_jax.data.images import BadImageError
  from vit_jax.evaluate.classify import evaluate_split
  from vit_jax.evaluate.predict import eval_data_config
  from vit_jax.optim.losses import LOSSES
  from vit_jax.step import predict_logits

  reading = {'workers': args.workers, 'threads': args.threads, 'bad_images': args.bad_images}
  data = eval_data_config(model, batch=min(batch_size(args), len(source)), **reading)
  predict, loss = functools.partial(predict_logits, model=model.model), LOSSES[model.loss]
  bar = tqdm.tqdm(
    total=len(source),
    unit='image',
    dynamic_ncols=True,
    leave=False,
    disable=not sys.stderr.isatty(),
  )
  with bar:
    progress = lambda images: bar.update(min(images, bar.total - bar.n))
    try:
      return evaluate_split(
        model.params, source, data, predict=predict, loss=loss, columns=columns, progress=progress
      )
    except BadImageError as error:
      name, reason = error.args
      raise UserError(
        f'{name}: {reason}. Replace or remove it, or leave such out with --bad_images skip'
      ) from None


def summary(model, args, source, result) -> dict:
  """What is said of the whole split, for JSON and for the screen."""
  from vit_jax.data.class_names import is_imagenet_validation

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
    'preprocessing': model.preprocessing,
  }
  published = is_imagenet_validation(
    source.label_names, examples=len(source), max_labels=source.max_labels
  )
  if model.accuracy is not None and published:
    facts |= {'expected_accuracy': model.accuracy / 100, 'expected_from': model.accuracy_from}
  return facts


def in_words(facts: dict) -> str:
  """For the screen."""
  expected = ''
  if 'expected_accuracy' in facts:
    expected = f'  expected {facts["expected_accuracy"]:.2%} ({facts["expected_from"]})'
  skipped = f'  and {facts["skipped"]:,} that could not be read' if facts['skipped'] else ''
  return (
    f'{facts["model"]} on {facts["data"]} {facts["split"]}, {facts["classes"]:,} classes\n'
    f'accuracy  {facts["accuracy"]:8.2%}{expected}\n'
    f'top 5     {facts["accuracy_top5"]:8.2%}\n'
    f'loss      {facts["loss"]:8.4f}\n'
    f'examples  {facts["examples"]:8,}{skipped}\n'
    f'images/s  {facts["images_per_second"]:8,.1f}\n'
  )


def report(args, source, result, *, title: str):
  """Class by class, where that was asked for."""
  from vit_jax.evaluate.confusion import confusion_matrix, count_per_class, plot_confusion_matrix

  k, names = source.classes, source.label_names
  if args.per_class:
    counts = [each.tolist() for each in count_per_class(result.labels, result.predicted, k)]
    rows = [
      (name, n, right, right / n if n else None)
      for name, n, right in zip(names, *counts, strict=True)
    ]
    write_output(
      table(rows) if args.per_class == STDOUT else format_csv([COLUMNS, *map(blank, rows)]),
      args.per_class,
    )
  if args.confusion:
    plot_confusion_matrix(
      confusion_matrix(result.labels, result.predicted, k), names, args.confusion, title=title
    )


def blank(row: tuple) -> tuple:
  """None as an empty cell."""
  return tuple(
    '' if cell is None else f'{cell:.6g}' if isinstance(cell, float) else cell for cell in row
  )


def table(rows: list[tuple]) -> str:
  """For the screen; the worst class first."""
  worst_first = sorted(rows, key=lambda row: (row[3] is None, row[3]))
  cells = [
    (name, f'{n:,}', f'{right:,}', '-' if share is None else f'{share:.2%}')
    for name, n, right, share in worst_first
  ]
  return format_table([COLUMNS, *cells])


def add(commands):
  """The arguments."""
  command = commands.add_parser('evaluate', help=evaluate.__doc__, description=evaluate.__doc__)
  command.set_defaults(function=evaluate)
  command.add_argument(
    '--data', metavar='NAME', help='builtin:NAME, folder:PATH, csv:PATH or tfds:NAME'
  )
  command.add_argument(
    '--split', default='', help='by default the held-out split: test, validation or val'
  )
  command.add_argument(
    '--dir', default='', help="where TFDS data sets lie; by default $TFDS_DATA_DIR, or TFDS's own"
  )
  add_batch(command)
  command.add_argument(
    '--workers', type=whole, default=0, help='processes that read images; 0 does it in threads'
  )
  command.add_argument(
    '--threads', type=whole, default=0, help='threads that read images, in each process; 0 chooses'
  )
  command.add_argument(
    '--bad_images', default='error', choices=('error', 'skip'), help='what an unreadable image is'
  )
  command.add_argument(
    '--per_class', metavar='FILE', help='accuracy of each class as CSV; - for a table on stdout'
  )
  command.add_argument(
    '--confusion', metavar='PNG', help='a picture of which class is taken for which'
  )
  command.add_argument(
    '--json', metavar='FILE', help='all of it as one object; - for stdout, in place of the text'
  )
  add_protocol(command)
  add_vtab(command)
  add_model(command)
