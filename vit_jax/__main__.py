"""python -m vit_jax COMMAND: everything but the two main jobs."""

import argparse
import os
import sys
from pathlib import Path

from vit_jax.config import DataConfig
from vit_jax.entry import one_line_errors


def data_list(args):
  """Every source that can be named without preparing anything, and the data sets prepared under --dir."""
  from vit_jax.data.prepare import list_sources

  rows = list_sources(args.dir)
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  for row in rows:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def data_prepare(args):
  """Builds a TFDS data set as ArrayRecord, or converts one that lies there as TFRecord."""
  from vit_jax.data.prepare import prepare

  prepare(args.name, args.dir)


def data_show(args):
  """A picture of the augmented training batch beside the evaluation batch: what the model will see."""
  from vit_jax.data.contact_sheet import contact_sheet
  from vit_jax.data.loader import eval_batches, train_batches
  from vit_jax.data.sources import open_source

  size = tuple(int(side) for side in args.size.split(','))
  data = DataConfig(train=args.name, dir=args.dir, batch=args.images, size=size * 2 if len(size) == 1 else size, crop=args.crop)
  sources = open_source(args.name, args.split, dir=args.dir), open_source(args.name, args.eval_split, dir=args.dir)
  train = next(train_batches(sources[0], data, seed=args.seed, start=args.step, host=0, hosts=1))
  # An evaluation split is often in the order of its classes: examples spread over it show them all.
  evaluation = next(eval_batches(sources[1].spread(args.images), data, host=0, hosts=1))
  named = lambda batch: [label_of(labels, sources[0].label_names) for labels in batch['label']]
  contact_sheet(train['image'], named(train), evaluation['image'], named(evaluation), Path(args.out))
  for source in sources:
    print(f'{args.name} {source.split}: {len(source):,} examples of {source.classes:,} classes')
  print(f'{args.out}: {args.images} images of batch {args.step}, augmented, beside as many for evaluation')


def label_of(labels, names: tuple[str, ...]) -> str:
  """The names of an example's classes."""
  return ', '.join(names[label] for label in labels if label >= 0)


def predict(args):
  """The most probable classes of images: files, folders or patterns."""
  from vit_jax import commands

  commands.predict(args, OVERRIDES)


def evaluate(args):
  """Exact accuracy of a pre-trained model on a whole split of a data set."""
  from vit_jax import commands

  commands.evaluate(args, OVERRIDES)


def export(args):
  """Writes a model in another format, reads it again and compares."""
  from vit_jax import commands

  commands.export(args, OVERRIDES)


def plan(args):
  """Compiles a run's train step for a TPU slice that is not here: does it fit, and how long would it take?"""
  from vit_jax import commands

  commands.plan(args)


def numbers(kind: type):
  """'0.5' or '0.485,0.456,0.406' -> one number or several."""

  def parse(text: str):
    values = tuple(kind(part) for part in text.split(','))
    return values[0] if len(values) == 1 else values

  parse.__name__ = f'{kind.__name__}s'  # What argparse calls it in an error.
  return parse


# What a file cannot tell of its model, or tells wrongly: keywords of `vit_jax.load`.
SETTINGS = {
  'gelu': {'choices': ('tanh', 'erf')},
  'norm_eps': {'type': float, 'help': 'epsilon of the norms'},
  'heads': {'type': int, 'help': 'attention heads, where the arrays do not tell'},
  'mean': {'type': numbers(float), 'help': 'of a pixel in [0, 1]: R,G,B'},
  'std': {'type': numbers(float), 'help': 'of a pixel in [0, 1]: R,G,B'},
  'size': {'type': numbers(int), 'help': 'pixels: SIDE, or HEIGHT,WIDTH; position embeddings are resampled to it'},
  'patch': {'type': int, 'help': 'pixels: patch kernels are resized to it as FlexiViT does'},
  'positions': {'choices': ('corner', 'half_pixel', 'bicubic'), 'help': 'how position embeddings are resampled'},
  'crop': {'choices': ('resize', 'center')},
  'short_side': {'type': int, 'help': 'pixels, before a center crop'},
  'dtype': {'choices': ('float32', 'bfloat16'), 'help': 'of the computation'},
}
OVERRIDES = tuple(SETTINGS)


def parser() -> argparse.ArgumentParser:
  """The commands and their arguments."""
  top = argparse.ArgumentParser(
    prog='vit-jax', description='Vision Transformers; to train, see run_pretrain.py and run_finetune.py.'
  )
  commands = top.add_subparsers(required=True, metavar='COMMAND')
  add_data(commands)

  def add(function) -> argparse.ArgumentParser:
    command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
    command.set_defaults(function=function)
    command.add_argument('--init', required=True, help='a name of the catalogue, a file, a directory or a URL')
    for name, how in SETTINGS.items():
      command.add_argument(f'--{name}', **how)
    return command

  command = add(predict)
  command.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders or patterns')
  command.add_argument('--top', type=int, default=5, help='classes for each image')
  command.add_argument('--batch', type=int, default=32)
  command.add_argument('--json', metavar='FILE', help='- for the screen, instead of the table')
  command.add_argument('--csv', metavar='FILE', help='- for the screen, instead of the table')
  command = add(evaluate)
  command.add_argument('--data', required=True, help='a source: builtin:NAME, folder:PATH, csv:PATH or tfds:NAME')
  command.add_argument('--split', default='', help='by default the held-out split: test, validation or val')
  command.add_argument('--dir', default='', help="where TFDS data sets lie; by default $TFDS_DATA_DIR, or TFDS's own")
  command.add_argument('--batch', type=int, default=64)
  command.add_argument('--workers', type=int, default=0, help='processes that make batches; 0 makes them in threads')
  command.add_argument('--threads', type=int, default=0, help='that decode, in each process; 0 means the cores shared out')
  command.add_argument('--per_class', metavar='CSV', help='accuracy by class; - for the screen')
  command.add_argument('--confusion', metavar='PNG', help='a picture of what is taken for what')
  command.add_argument('--json', metavar='FILE', help='- for the screen')
  command = add(export)
  command.add_argument('--to', required=True, help='a file .npz, .onnx or .stablehlo, or a directory')
  formats = ('npz', 'timm', 'huggingface', 'onnx', 'stablehlo')
  command.add_argument('--format', choices=formats, help="by default by --to's suffix")
  command = commands.add_parser('plan', help=plan.__doc__, description=plan.__doc__)
  command.set_defaults(function=plan)
  command.add_argument('--topology', required=True, help='a TPU slice, such as v5e:4x4')
  command.add_argument('--slices', type=int, default=1, help='of that kind, over the slower network')
  command.add_argument('--json', metavar='FILE', help='- for the screen')
  command.add_argument('--hlo', metavar='FILE', help='the compiled program')
  return top


def add_data(commands):
  """The command `data` and its actions."""
  data = commands.add_parser('data', help='list, prepare or look at data sets').add_subparsers(required=True, metavar='ACTION')

  def add(name: str, function) -> argparse.ArgumentParser:
    command = data.add_parser(name, help=function.__doc__, description=function.__doc__)
    command.add_argument('--dir', default='', help="where TFDS data sets lie; by default $TFDS_DATA_DIR, or TFDS's own")
    command.set_defaults(function=function)
    return command

  add('list', data_list)
  add('prepare', data_prepare).add_argument('name', help='tfds:NAME, such as tfds:cifar10')
  show = add('show', data_show)
  show.add_argument('name', help='a source: builtin:NAME, folder:PATH, csv:PATH or tfds:NAME')
  show.add_argument('--split', default='train')
  show.add_argument('--eval_split', default='', help='by default the held-out split: test, validation or val')
  show.add_argument('--size', default='224', help='pixels: SIDE, or HEIGHT,WIDTH')
  show.add_argument('--crop', default='inception', choices=('inception', 'resize'))
  show.add_argument('--images', type=int, default=24)
  show.add_argument('--seed', type=int, default=0)
  show.add_argument('--step', type=int, default=0, help='which batch')
  show.add_argument('--out', default='contact_sheet.png')


def main():
  """The command line; an error that the user can mend is one line and exit code 2."""
  args, args.more = parser().parse_known_args()
  if args.more and args.function is not plan:
    parser().error(f'unrecognized arguments: {" ".join(args.more)}')
  try:
    one_line_errors(lambda: args.function(args))
    sys.stdout.flush()
  except BrokenPipeError:  # `| head`: nobody reads on, and the interpreter need not try at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
  main()
