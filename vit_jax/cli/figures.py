"""figures: plot and measure what a model has learned."""

from pathlib import Path

from vit_jax.cli.arguments import add_model_flags, load_model, print_notes
from vit_jax.cli.results import format_csv, write_output
from vit_jax.runtime.screen import print_stderr


def figures(args):
  """Plot a model's filters, position embeddings, attention distance and attention maps."""
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
    print_stderr('without --images there are no attention distances and no attention maps')
  analysis = analyze_model(model, source)
  out = Path(args.out)
  blur = max(model.model.shape.stride)
  for path in save_figures(analysis, out, title=Path(model.source).name, blur=blur):
    print(path)
  summaries = {
    Path(model.source).name: summarize_analysis(analysis),
    'untrained': summarize_analysis(analyze_model(reinitialize_model(model), source)),
  }
  for name in args.beside:
    other = vit_jax.load(name)
    print_notes(other)
    source = open_figure_images(args.images, other) if args.images else None
    summaries[Path(other.source).name] = summarize_analysis(analyze_model(other, source))
  rows = arrange_summaries(summaries | published_summaries())
  table = format_markdown_table(rows)
  write_output(format_csv(rows), str(out / 'numbers.csv'))
  write_output(table, str(out / 'numbers.md'))
  print(out / 'numbers.csv', out / 'numbers.md', table, sep='\n', end='')


def open_figure_images(names: list[str], model):
  """Open files, folders and patterns, or one source such as builtin:digits.

  If there are more than MAX_FIGURE_IMAGES images, choose that number at equal intervals.
  """
  from vit_jax.data.sources import STORES, open_source
  from vit_jax.evaluate.predict import ImageFiles, find_image_files
  from vit_jax.paper.figures import MAX_FIGURE_IMAGES

  if len(names) == 1 and ':' in names[0] and names[0].partition(':')[0] in STORES:
    return open_source(names[0], '').subsample(MAX_FIGURE_IMAGES)
  paths = find_image_files(names)
  step = max(1, len(paths) / MAX_FIGURE_IMAGES)
  count = min(len(paths), MAX_FIGURE_IMAGES)
  return ImageFiles(tuple(paths[int(i * step)] for i in range(count)))


def arrange_summaries(summaries: dict[str, dict[str, float]]) -> list[tuple]:
  """Return a row for each number and a column for each model, after a row of headings.

  A cell is empty if a model lacks the number.
  """
  rows = [('', *summaries)]
  for name in dict.fromkeys(name for summary in summaries.values() for name in summary):
    values = [summary.get(name) for summary in summaries.values()]
    rows.append((name, *('' if value is None else f'{value:.3f}' for value in values)))
  return rows


def format_markdown_table(rows: list[tuple]) -> str:
  """Format rows as a Markdown table. The first row is the heading."""
  heading, *others = ('| ' + ' | '.join(cells) + ' |\n' for cells in rows)
  return ''.join([heading, '|---' * len(rows[0]) + '|\n', *others])


def add(commands):
  """Add the command and its arguments."""
  command = commands.add_parser('figures', help=figures.__doc__, description=figures.__doc__)
  command.set_defaults(function=figures)
  images = (
    'images to compute attention on: files, folders, patterns, or a source such as builtin:digits'
  )
  command.add_argument('--images', nargs='+', default=[], metavar='IMAGE', help=images)
  out = 'directory of the figures; by default figures'
  command.add_argument('--out', default='figures', metavar='DIR', help=out)
  beside = 'other models to compare the numbers with'
  command.add_argument('--beside', nargs='+', default=[], metavar='SOURCE', help=beside)
  add_model_flags(command)
