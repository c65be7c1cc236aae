"""The command `predict`: the most probable classes of images."""

import json
import sys
import textwrap
from collections.abc import Iterator

from vit_jax.cli.arguments import (
  add_batch_flag,
  add_model_flags,
  eval_batch_size,
  load_model,
  positive_int,
  probability,
)
from vit_jax.cli.results import STDOUT, check_output_paths, format_csv, open_output
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
  top = args.top or (model.classes if args.threshold else 5)
  predictions = predict_files(
    model, paths, top=top, batch=eval_batch_size(args), threshold=args.threshold
  )
  unreadable = _write_predictions(predictions, paths, json_path=args.json, csv_path=args.csv)
  if unreadable:
    print_stderr(f'{unreadable} of {len(paths)} images could not be read')
    sys.exit(1)


def _write_predictions(
  predictions, paths: list[str], *, json_path: str | None, csv_path: str | None
) -> int:
  """Write each prediction as soon as it is made. Return the number of images without one.

  Only one prediction is in memory at a time. The table is printed unless a result goes to stdout.
  """
  unreadable = 0
  with open_output(json_path) as write_json, open_output(csv_path) as write_csv:
    write_csv(format_csv([_COLUMNS]))
    separator = '[\n'
    for each in _print_predictions(predictions, paths, table=STDOUT not in (json_path, csv_path)):
      text = json.dumps(_to_json_object(each), indent=1)
      write_json(separator + textwrap.indent(text, ' '))
      write_csv(format_csv(_to_csv_rows(each)))
      separator = ',\n'
      unreadable += bool(each.error)
    write_json('\n]\n')
  return unreadable


def _print_predictions(predictions, paths: list[str], *, table: bool) -> Iterator:
  """Yield the predictions under a progress bar. If `table`, print them, too."""
  import tqdm

  width = max(len(_printable(path)) for path in paths)
  bar = tqdm.tqdm(
    total=len(paths),
    unit='image',
    dynamic_ncols=True,
    disable=len(paths) < _MIN_IMAGES_WITH_PROGRESS_BAR or not sys.stderr.isatty(),
  )
  with bar:
    for each in predictions:
      if table:
        bar.write('\n'.join(_format_prediction(each, width)), file=sys.stdout)
      yield each
      bar.update()


def _format_prediction(prediction, width: int) -> list[str]:
  """Return the lines of a prediction, the path beside the first class."""
  path = _printable(prediction.path).ljust(width)
  if prediction.error:
    return [f'{path}    error  {_printable(prediction.error)}']
  if not prediction.labels:
    return [f'{path}     none  no class reaches the threshold']
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
  """Return a row of `_COLUMNS` for each class. Ranks start at 1.

  An image without a class above the threshold has a row without a class.
  """
  if prediction.error:
    return [(prediction.path, '', '', '', prediction.error)]
  if not prediction.labels:
    return [(prediction.path, '', '', '', '')]
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
  command.add_argument(
    '--threshold',
    type=probability,
    metavar='P',
    help='only classes with a probability of at least P; without --top, all of these',
  )
  add_batch_flag(command)
  command.add_argument(
    '--json', metavar='FILE', help='write a JSON list of objects; - prints it instead of the table'
  )
  command.add_argument(
    '--csv', metavar='FILE', help='write path, rank, label, probability, error; - prints them'
  )
  add_model_flags(command)
