"""data list, data prepare, data show."""

from pathlib import Path

from vit_jax.cli.arguments import positive, sides
from vit_jax.config import DataConfig


def data_list(args):
  """Every source that can be named without preparing anything, and the data sets prepared under --dir."""
  from vit_jax.data.prepare import list_sources

  rows = list_sources(args.dir)
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  for row in rows:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def data_prepare(args):
  """Builds a TFDS data set as ArrayRecord, or converts one that lies there as TFRecord."""
  from vit_jax.data.prepare import prepare_dataset

  prepare_dataset(args.name, args.dir)


def data_show(args):
  """A picture of the augmented training batch beside the evaluation batch: what the model will see."""
  from vit_jax.data.contact_sheet import write_contact_sheet
  from vit_jax.data.loader import eval_batches, train_batches
  from vit_jax.data.sources import open_source

  data = DataConfig(
    train=args.name, dir=args.dir, batch=args.images, size=args.size, crop=args.crop
  )
  sources = (
    open_source(args.name, args.split, dir=args.dir),
    open_source(args.name, args.eval_split, dir=args.dir),
  )
  train = next(train_batches(sources[0], data, seed=args.seed, start=args.step, host=0, hosts=1))
  # An evaluation split is often in the order of its classes: examples spread over it show them all.
  evaluation = next(eval_batches(sources[1].spread(args.images), data, host=0, hosts=1))
  named = lambda batch: [label_of(labels, sources[0].label_names) for labels in batch['label']]
  write_contact_sheet(
    train['image'], named(train), evaluation['image'], named(evaluation), Path(args.out)
  )
  for source in sources:
    print(f'{args.name} {source.split}: {len(source):,} examples of {source.classes:,} classes')
  print(
    f'{args.out}: {args.images} images of batch {args.step}, augmented, beside as many for evaluation'
  )


def label_of(labels, names: tuple[str, ...]) -> str:
  """The names of an example's classes."""
  return ', '.join(names[label] for label in labels if label >= 0)


def add(commands):
  """The arguments."""
  help = 'list, prepare or look at data sets'
  data = commands.add_parser('data', help=help, description=help).add_subparsers(
    required=True, metavar='ACTION'
  )

  def action(name: str, function):
    command = data.add_parser(name, help=function.__doc__, description=function.__doc__)
    command.add_argument(
      '--dir', default='', help="where TFDS data sets lie; by default $TFDS_DATA_DIR, or TFDS's own"
    )
    command.set_defaults(function=function)
    return command

  action('list', data_list)
  action('prepare', data_prepare).add_argument('name', help='tfds:NAME, such as tfds:cifar10')
  show = action('show', data_show)
  show.add_argument('name', help='a source: builtin:NAME, folder:PATH, csv:PATH or tfds:NAME')
  show.add_argument('--split', default='train')
  show.add_argument(
    '--eval_split', default='', help='by default the held-out split: test, validation or val'
  )
  show.add_argument('--size', type=sides, default=(224, 224), help='pixels: SIDE, or HEIGHT,WIDTH')
  show.add_argument('--crop', default='inception', choices=('inception', 'resize'))
  show.add_argument('--images', type=positive, default=24)
  show.add_argument('--seed', type=int, default=0)
  show.add_argument('--step', type=int, default=0, help='which batch')
  show.add_argument('--out', default='contact_sheet.png')
