"""The command `predict`: the most probable classes of images."""

import json
import sys

from vit_jax.cli.arguments import (
  add_batch_flag,
  add_model_flags,
  eval_batch_size,
  load_model,
  positive_int,
)
from vit_jax.cli.results import STDOUT, check_output_paths, format_csv, write_output
from vit_jax.errors import UserError
from vit_jax.runtime.screen import print_stderr

_MIN_IMAGES_WITH_PROGRESS_BAR = 100
_COLUMNS = ('path', 'rank', 'label', 'probability', 'error')


def predict(args):
  """Predict the most probable classes of images: files, folders, or patterns like 'a/**/*.jpg'."""
  from vit_jax.evaluate.predict import check_trained_head, find_image_files, predict_files

  check_output_paths(json=args.json, csv=args.csv)
  paths = find_image_files(args.images)
  model = load_model(args)
  check_trained_head(model)
  if args.top and args.top > model.classes:
    raise UserError(f'--top {args.top}: {model.source} has {model.classes} classes')
  predictions = predict_files(model, paths, top=args.top or 5, batch=eval_batch_size(args))
  predictions = _print_predictions(predictions, paths, table=STDOUT not in (args.json, args.csv))
  objects = [_to_json_object(each) for each in predictions]
  write_output(json.dumps(objects, indent=1) + '\n', args.json)
  rows = [row for each in predictions for row in _to_csv_rows(each)]
  write_output(format_csv([_COLUMNS, *rows]), args.csv)
  if unreadable := sum(bool(each.error) for each in predictions):
    print_stderr(f'{unreadable} of {len(predictions)} images could not be read')
    sys.exit(1)


def _print_predictions(predictions, paths: list[str], *, table: bool) -> list:
  """Collect the predictions. If `table`, print each of them as soon as it is made."""
  import tqdm

  width, collected = max(len(_printable(path)) for path in paths), []
  bar = tqdm.tqdm(
    total=len(paths),
    unit='image',
    dynamic_ncols=True,
    disable=len(paths) < _MIN_IMAGES_WITH_PROGRESS_BAR or not sys.stderr.isatty(),
  )
  with bar:
    for each in predictions:
      collected.append(each)
      if table:
        bar.write('\n'.join(_format_prediction(each, width)), file=sys.stdout)
      bar.update()
  return collected


def _format_prediction(prediction, width: int) -> list[str]:
  """Return the lines of a prediction, the path beside the first class."""
  path = _printable(prediction.path).ljust(width)
  if prediction.error:
    return [f'{path}    error  {_printable(prediction.error)}']
  pairs = zip(prediction.probabilities, prediction.labels, strict=True)
  return [
    f'{" " * width if rank else path}  {probability:7.2%}  {label}'
    for rank, (probability, label) in enumerate(pairs)
  ]


def _printable(text: str) -> str:
  """Escape the bytes of a file name that are not text."""
  return text.encode('utf-8', 'backslashreplace').decode()


def _to_json_object(prediction) -> dict:
  if prediction.error:
    return {'path': prediction.path, 'error': prediction.error}
  pairs = zip(prediction.labels, prediction.probabilities, strict=True)
  classes = [{'label': label, 'probability': probability} for label, probability in pairs]
  return {'path': prediction.path, 'predictions': classes}


def _to_csv_rows(prediction) -> list[tuple]:
  """Return a row of `_COLUMNS` for each class. Ranks start at 1."""
  if prediction.error:
    return [(prediction.path, '', '', '', prediction.error)]
  pairs = zip(prediction.labels, prediction.probabilities, strict=True)
  return [
    (prediction.path, rank, label, f'{probability:.6g}', '')
    for rank, (label, probability) in enumerate(pairs, start=1)
  ]


def add(commands):
  """Add the parser of the command."""
  command = commands.add_parser('predict', help=predict.__doc__, description=predict.__doc__)
  command.set_defaults(function=predict)
  command.add_argument(
    'images',
    nargs='+',
    metavar='IMAGE',
    help='a file, a folder (every image below it), or a pattern',
  )
  command.add_argument(
    '--top', type=positive_int, help='classes per image (default: 5, or all if there are fewer)'
  )
  add_batch_flag(command)
  command.add_argument(
    '--json', metavar='FILE', help='write a list of objects; - for stdout instead of the table'
  )
  command.add_argument(
    '--csv', metavar='FILE', help='write path, rank, label, probability, error; - for stdout'
  )
  add_model_flags(command)
