"""The commands `data list`, `data prepare`, `data show`, `data pack` and `data verify`."""

import argparse
from pathlib import Path

from vit_jax.cli.arguments import SOURCE_KINDS, image_size, positive_int
from vit_jax.config import DataConfig


def data_list(args):
  """List the built-in datasets and the TFDS datasets prepared in --dir."""
  from vit_jax.data.prepare import list_sources

  rows = list_sources(args.dir)
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  for row in rows:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def data_prepare(args):
  """Download and build a TFDS dataset as ArrayRecord, or convert one prepared as TFRecord."""
  from vit_jax.data.prepare import prepare_dataset

  prepare_dataset(args.name, args.dir)


def data_show(args):
  """Write a picture of an augmented training batch beside an evaluation batch."""
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
  # Evaluation splits are often sorted by class; evenly spaced examples show every class.
  evaluation = next(eval_batches(sources[1].subsample(args.images), data, host=0, hosts=1))
  named = lambda batch: [
    join_label_names(labels, sources[0].label_names) for labels in batch['label']
  ]
  write_contact_sheet(
    train['image'], named(train), evaluation['image'], named(evaluation), Path(args.out)
  )
  for source in sources:
    print(f'{args.name} {source.split}: {len(source):,} examples of {source.classes:,} classes')
  print(
    f'{args.out}: {args.images} augmented images of batch {args.step}, {args.images} for evaluation'
  )


def data_pack(args):
  """Pack a source into ArrayRecord shards, which records:DIR reads. Continues if it was killed."""
  from vit_jax.data.pack import PackOptions, pack_source

  options = PackOptions(
    splits=tuple(args.split),
    shards=args.shards or 0,
    reencode=args.reencode,
    keep_unreadable=args.bad_images == 'keep',
    threads=args.threads or 0,
  )
  manifest = pack_source(args.name, args.to, options, dir=args.dir)
  for name, split in manifest.splits.items():
    size = sum(shard.bytes for shard in split.shards)
    print(f'{name}: {split.examples:,} examples in {len(split.shards):,} shards, {size:,} bytes')
    if unreadable := sum(shard.unreadable for shard in split.shards):
      print(f'{name}: {unreadable:,} images could not be read; their records count as unreadable')
  print(f'read them as records:{args.to}')


def data_verify(args):
  """Check the checksums, the counts and samples of packed data. Changes nothing.

  The exit code is 1 if a file is damaged. An image that was bad when it was packed is no damage.
  """
  from vit_jax.data.verify_records import verify_records

  are_good = True
  for name, details, is_good, bad_images in verify_records(args.folder):
    print(f'{name:<40}  {"good" if is_good else "DAMAGED"}  {details}', flush=True)
    for text in bad_images:
      print(f'  bad image  {text}', flush=True)
    are_good &= is_good
  raise SystemExit(0 if are_good else 1)


def short_side_and_quality(text: str) -> tuple[int, int]:
  """Parse 'SHORT_SIDE,QUALITY' as the type of an argument."""
  try:
    short_side, quality = map(int, text.split(','))
  except ValueError:
    short_side, quality = 0, 0
  if short_side < 1 or not 1 <= quality <= 100:
    raise argparse.ArgumentTypeError(
      f'{text!r}: expected SHORT_SIDE,QUALITY, such as 512,95: pixels, and 1 to 100'
    )
  return short_side, quality


def join_label_names(labels, names: tuple[str, ...]) -> str:
  """Join the class names of an example. Labels of -1 are padding."""
  return ', '.join(names[label] for label in labels if label >= 0)


def add(commands):
  """Add the `data` commands."""
  help = 'List, prepare, show, pack or verify datasets.'
  data = commands.add_parser('data', help=help, description=help).add_subparsers(
    required=True, metavar='ACTION'
  )

  def action(name: str, function):
    command = data.add_parser(name, help=function.__doc__, description=function.__doc__)
    command.add_argument(
      '--dir',
      default='',
      help="directory of TFDS datasets; default: $TFDS_DATA_DIR, or else TFDS's own default",
    )
    command.set_defaults(function=function)
    return command

  action('list', data_list)
  action('prepare', data_prepare).add_argument('name', help='a TFDS dataset, such as tfds:cifar10')
  show = action('show', data_show)
  show.add_argument('name', help=f'source: {SOURCE_KINDS}')
  show.add_argument('--split', default='train', help='split of the training images')
  show.add_argument(
    '--eval_split',
    default='',
    help='split of the evaluation images; default: test, validation or val',
  )
  show.add_argument(
    '--size', type=image_size, default=(224, 224), help='SIDE or HEIGHT,WIDTH in pixels'
  )
  show.add_argument(
    '--crop',
    default='inception',
    choices=('inception', 'resize'),
    help='training images: resize a random box, or the image without a crop',
  )
  show.add_argument(
    '--images', type=positive_int, default=24, help='number of training and of evaluation images'
  )
  show.add_argument('--seed', type=int, default=0, help='seed of the order and the augmentation')
  show.add_argument('--step', type=int, default=0, help='index of the training batch')
  show.add_argument('--out', default='contact_sheet.png', help='the PNG file to write')
  _add_pack(action('pack', data_pack))
  verify = action('verify', data_verify)
  verify.add_argument('folder', type=Path, metavar='DIR', help='a directory that `pack` wrote')


def _add_pack(pack):
  """Add the arguments of `data pack`."""
  pack.add_argument('name', help=f'source: {SOURCE_KINDS}, images:PATH')
  pack.add_argument(
    '--to', type=Path, required=True, metavar='FOLDER', help='the directory to write'
  )
  pack.add_argument(
    '--split',
    action='append',
    default=[],
    metavar='NAME[=SPLIT]',
    help='a split, or a part of one under another name, such as train=train[:90%%]; may be '
    'repeated; default: all splits',
  )
  pack.add_argument(
    '--shards', type=positive_int, help='files for each split; default: files of about 512 MiB'
  )
  pack.add_argument(
    '--reencode',
    type=short_side_and_quality,
    metavar='SHORT_SIDE,QUALITY',
    help='reduce larger images to this short side, as JPEG of this quality, such as 512,95; '
    'default: the files unchanged',
  )
  pack.add_argument(
    '--bad_images',
    default='error',
    choices=('error', 'keep'),
    help='an unreadable file: end, or keep it as a record that counts as unreadable',
  )
  pack.add_argument('--threads', type=positive_int, help='threads that read; default: CPUs + 1')
