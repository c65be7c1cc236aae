"""figures: what a model learned, drawn and in numbers."""

from pathlib import Path

from vit_jax.cli.arguments import add_model, load_model
from vit_jax.cli.results import format_csv, write_output
from vit_jax.runtime.cluster import print_stderr


def figures(args):
  """Experiment 4 of the paper: filters, position embeddings, attention distance and attention maps of a model."""
  import vit_jax
  from vit_jax.paper.figures import (
    analyze_model,
    published_summaries,
    reinitialize_model,
    save_figures,
    summarize_analysis,
  )

  model = load_model(args)
  source = open_figure_images(args.images, model) if args.images else None
  if source is None:
    print_stderr('without --images there are neither attention distances nor attention maps')
  seen = analyze_model(model, source)
  out = Path(args.out)
  for path in save_figures(
    seen, out, title=Path(model.source).name, blur=max(model.model.shape.stride)
  ):
    print(path)
  columns = {
    Path(model.source).name: summarize_analysis(seen),
    'untrained': summarize_analysis(analyze_model(reinitialize_model(model), source)),
  }
  for name in args.beside:
    other = vit_jax.load(name)
    columns[Path(other.source).name] = summarize_analysis(
      analyze_model(other, open_figure_images(args.images, other) if args.images else None)
    )
  rows = arrange_summaries(columns | published_summaries())
  write_output(format_csv(rows), str(out / 'numbers.csv'))
  write_output(format_markdown_table(rows), str(out / 'numbers.md'))
  print(out / 'numbers.csv', out / 'numbers.md', format_markdown_table(rows), sep='\n', end='')


def open_figure_images(places: list[str], model):
  """Files, folders and patterns, or one source such as builtin:digits; of many, as many as the paper took, evenly spread."""
  from vit_jax.data.sources import STORES, open_source
  from vit_jax.evaluate.predict import ImageFiles, find_image_files
  from vit_jax.paper.figures import MAX_FIGURE_IMAGES

  if len(places) == 1 and places[0].partition(':')[0] in STORES and ':' in places[0]:
    return open_source(places[0], '').subsample(MAX_FIGURE_IMAGES)
  paths = find_image_files(places)
  step = max(1, len(paths) / MAX_FIGURE_IMAGES)
  return ImageFiles(tuple(paths[int(i * step)] for i in range(min(len(paths), MAX_FIGURE_IMAGES))))


def arrange_summaries(columns: dict[str, dict[str, float]]) -> list[tuple]:
  """A row for each number, a column for each model; empty where there is none."""
  names = dict.fromkeys(name for numbers in columns.values() for name in numbers)
  cell = lambda value: '' if value is None else f'{value:.3f}'
  return [
    ('', *columns),
    *((name, *(cell(numbers.get(name)) for numbers in columns.values())) for name in names),
  ]


def format_markdown_table(rows: list[tuple]) -> str:
  """The same for people."""
  line = lambda cells: '| ' + ' | '.join(cells) + ' |\n'
  return ''.join([line(rows[0]), '|---' * len(rows[0]) + '|\n', *map(line, rows[1:])])


def add(commands):
  """The arguments."""
  command = commands.add_parser('figures', help=figures.__doc__, description=figures.__doc__)
  command.set_defaults(function=figures)
  what = 'files, folders and patterns, or a source such as builtin:digits: what attention is looked at on'
  command.add_argument('--images', nargs='+', default=[], metavar='IMAGE', help=what)
  command.add_argument(
    '--out', default='figures', metavar='DIR', help='where they go; by default figures'
  )
  command.add_argument(
    '--beside',
    nargs='+',
    default=[],
    metavar='SOURCE',
    help='other models whose numbers stand beside',
  )
  add_model(command)
