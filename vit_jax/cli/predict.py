"""predict: the most probable classes of images."""

import json
import sys

from vit_jax.cli.arguments import add_batch, add_model, batch_size, load_model, positive
from vit_jax.cli.results import STDOUT, check_output_paths, format_csv, write_output
from vit_jax.errors import UserError
from vit_jax.runtime.cluster import print_stderr

LONG = 100  # Images from which on a bar shows how far it is.


def predict(args):
  """The most probable classes of images: files, folders and patterns such as 'photos/**/*.jpg'."""
  from vit_jax.evaluate.predict import check_trained_head, find_image_files, predict_files

  check_output_paths(json=args.json, csv=args.csv)
  paths = find_image_files(args.images)
  model = load_model(args)
  check_trained_head(model)
  if args.top and args.top > model.classes:
    raise UserError(f'--top {args.top}: {model.source} has {model.classes} classes')
  made = predict_files(model, paths, top=args.top or 5, batch=batch_size(args))
  done = shown(made, paths, table=STDOUT not in (args.json, args.csv))
  write_output(json.dumps([as_object(each) for each in done], indent=1) + '\n', args.json)
  write_output(
    format_csv(
      [
        ('path', 'rank', 'label', 'probability', 'error'),
        *(row for each in done for row in as_rows(each)),
      ]
    ),
    args.csv,
  )
  if unread := sum(bool(each.error) for each in done):
    print_stderr(f'{unread} of {len(done)} images could not be read')
    sys.exit(1)


def shown(made, paths: list[str], *, table: bool) -> list:
  """The predictions, each written to stdout as it is made, if `table`."""
  import tqdm

  width, done = max(len(printable(path)) for path in paths), []
  bar = tqdm.tqdm(
    total=len(paths),
    unit='image',
    dynamic_ncols=True,
    disable=len(paths) < LONG or not sys.stderr.isatty(),
  )
  with bar:
    for each in made:
      done.append(each)
      if table:
        bar.write('\n'.join(lines(each, width)), file=sys.stdout)
      bar.update()
  return done


def lines(each, width: int) -> list[str]:
  """A prediction for the screen: the path beside the first class, the others below it."""
  path = printable(each.path).ljust(width)
  if each.error:
    return [f'{path}    error  {printable(each.error)}']
  ranks = enumerate(zip(each.probabilities, each.labels, strict=True))
  return [
    f'{" " * width if rank else path}  {probability:7.2%}  {label}'
    for rank, (probability, label) in ranks
  ]


def printable(text: str) -> str:
  """A file's name may be no text."""
  return text.encode('utf-8', 'backslashreplace').decode()


def as_object(each) -> dict:
  """For JSON."""
  if each.error:
    return {'path': each.path, 'error': each.error}
  pairs = zip(each.labels, each.probabilities, strict=True)
  return {
    'path': each.path,
    'predictions': [{'label': label, 'probability': probability} for label, probability in pairs],
  }


def as_rows(each) -> list[tuple]:
  """For CSV: path, rank from 1, label, probability, error."""
  if each.error:
    return [(each.path, '', '', '', each.error)]
  pairs = zip(each.labels, each.probabilities, strict=True)
  return [
    (each.path, rank, label, f'{probability:.6g}', '')
    for rank, (label, probability) in enumerate(pairs, start=1)
  ]


def add(commands):
  """The arguments."""
  command = commands.add_parser('predict', help=predict.__doc__, description=predict.__doc__)
  command.set_defaults(function=predict)
  command.add_argument(
    'images',
    nargs='+',
    metavar='IMAGE',
    help='a file, a folder with everything below it, or a pattern',
  )
  command.add_argument(
    '--top', type=positive, help='classes of each image; by default 5, or all where there are fewer'
  )
  add_batch(command)
  command.add_argument(
    '--json', metavar='FILE', help='a list of objects; - for stdout, in place of the table'
  )
  command.add_argument(
    '--csv', metavar='FILE', help='path, rank, label, probability, error; - for stdout'
  )
  add_model(command)
