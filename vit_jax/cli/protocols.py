"""evaluate --protocol: how a model is examined beyond the accuracy of its own head, as a table and as JSON."""

import json
import sys

from vit_jax.cli.arguments import above_zero, batch_size, load_model, positive, whole
from vit_jax.cli.results import STDOUT, format_table, write_output
from vit_jax.cli.vtab import FLAGS
from vit_jax.errors import UserError
from vit_jax.runtime.cluster import print_stderr

FROZEN = ('fewshot', 'knn', 'linear')
LABEL_SETS = ('real', 'v2', 'a', 'r', 'objectnet')
COLUMNS = ('protocol', 'on', 'accuracy', 'std', 'examples')
# Flag -> its protocol.
ONLY = {
  'shots': 'fewshot',
  'seeds': 'fewshot',
  'l2': 'fewshot',
  'k': 'knn',
  'mapping': 'objectnet',
} | dict.fromkeys(FLAGS, 'vtab')


def examine(args):
  """Does what --protocol says."""
  model = load_model(args)
  subject, params, bar = subject_of(args, model)
  opened = [
    *open_frozen(args),
    *(open_label_sets(args, name, model) for name in args.protocol if name in LABEL_SETS),
  ]
  with bar:
    outcomes = [outcome for judge in opened for outcome in judge_or_say(judge, subject, params)]
  for each in outcomes:
    if not each.figures:
      raise UserError(f'{each.protocol} on {each.data}: a class has no example to learn from')
  facts = {'model': model.source, 'preprocessing': model.preprocessing, 'notes': [*model.notes]}
  facts |= {'results': [as_object(each) for each in outcomes]}
  if args.json != STDOUT:
    print(f'{model.source}\n{table(outcomes)}', end='')
  write_output(json.dumps(facts, indent=1) + '\n', args.json)


def refuse_misplaced(args):
  """UserError for flags that go with another protocol, and for frozen features without data."""
  if both := [
    name for name in ('classify', 'vtab') if name in args.protocol and len(args.protocol) > 1
  ]:
    raise UserError(f'--protocol {" ".join(args.protocol)}: {both[0]} goes alone')
  for flag, protocol in ONLY.items():
    if getattr(args, flag) is not None and protocol not in args.protocol:
      raise UserError(f'--{flag} goes with --protocol {protocol}')
  if not args.data and set(args.protocol) & {*FROZEN, 'classify'}:
    raise UserError('--data is missing: builtin:NAME, folder:PATH, csv:PATH or tfds:NAME')
  for flag in ('per_class', 'confusion'):
    if getattr(args, flag) and args.protocol != ['classify']:
      raise UserError(f'--{flag} goes with --protocol classify')
  if args.train_split and not set(args.protocol) & set(FROZEN):
    raise UserError(f'--train_split goes with --protocol {", ".join(FROZEN)}')


def subject_of(args, model):
  """(the model as protocols see it, its parameters, the bar that shows how far it is)."""
  import tqdm

  from vit_jax.evaluate.evaluator import make_pretrained_evaluator
  from vit_jax.evaluate.predict import eval_data_config

  reading = {'workers': args.workers, 'threads': args.threads, 'bad_images': args.bad_images}
  data = eval_data_config(model, batch=batch_size(args), **reading)
  bar = tqdm.tqdm(unit='image', dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())
  return *make_pretrained_evaluator(model, data, progress=bar.update), bar


def open_frozen(args) -> list:
  """The protocols on frozen features that are asked for, as one."""
  from vit_jax.evaluate import fewshot, knn, probes, protocols

  asked = [name for name in args.protocol if name in FROZEN]
  if not asked:
    return []
  pool, test = probes.open_pool_and_test(
    args.data, split=args.train_split, test_split=args.split, dir=args.dir
  )
  shots, seeds = (tuple(each or ()) for each in (args.shots, args.seeds))
  options = probes.ProbeOptions(
    shots=shots,
    seeds=seeds or fewshot.FEWSHOT_SEEDS,
    l2=args.l2 or fewshot.FEWSHOT_L2,
    k=args.k or knn.KNN_NEIGHBORS,
  )
  return [protocols.make_probe_protocol(asked, args.data, pool, test, options)]


def open_label_sets(args, protocol: str, model):
  """One of the test sets of ImageNet's classes."""
  from vit_jax.evaluate import protocols
  from vit_jax.evaluate.predict import check_trained_head

  check_trained_head(model)
  where = {'split': args.split, 'dir': args.dir, 'mapping': args.mapping or ''}
  facts = {'labels': model.labels, 'classes': model.classes, 'source': model.source}
  return protocols.make_label_set_protocol(protocol, args.data or '', **facts, **where)


def judge_or_say(judge, subject, params) -> list:
  """The outcomes. UserError where an image cannot be read, unless such are to be left out."""
  from vit_jax.data.images import BadImageError

  try:
    outcomes = judge(subject, params)
  except BadImageError as error:
    name, reason = error.args
    raise UserError(
      f'{name}: {reason}. Replace or remove it, or leave such out with --bad_images skip'
    ) from None
  for each in outcomes:
    if each.skipped:
      print_stderr(
        f'{each.protocol}: {each.skipped:,} images are left out: no class is right for them'
      )
  return outcomes


def as_object(outcome) -> dict:
  """For JSON."""
  facts = {
    'protocol': outcome.protocol,
    'data': outcome.data,
    'examples': outcome.examples,
    'skipped': outcome.skipped,
  }
  figures = {
    name: {'accuracy': each.accuracy, 'std': each.std, 'note': each.note}
    for name, each in outcome.figures.items()
  }
  return facts | {'pool': outcome.pool, 'figures': figures}


def table(outcomes: list) -> str:
  """For the screen."""
  std = lambda figure: '' if figure.std is None else f'{figure.std:.2%}'
  rows = [
    (
      f'{each.protocol} {name}',
      each.data,
      f'{figure.accuracy:.2%}',
      std(figure),
      f'{each.examples:,}',
    )
    for each in outcomes
    for name, figure in each.figures.items()
  ]
  return format_table([COLUMNS, *rows])


def add_protocol(command):
  """--protocol and what goes with it."""
  what = 'classify (the default), vtab, or any of ' + ', '.join((*FROZEN, *LABEL_SETS))
  names = ('classify', 'vtab', *FROZEN, *LABEL_SETS)
  command.add_argument(
    '--protocol', nargs='+', default=['classify'], choices=names, metavar='NAME', help=what
  )
  group = command.add_argument_group('protocols', 'what some of them want to know')
  group.add_argument(
    '--train_split', default='', help="what frozen features learn from; by default 'train'"
  )
  group.add_argument(
    '--shots',
    type=positive,
    nargs='+',
    help='fewshot: examples of each class; by default 1 5 10 25',
  )
  group.add_argument(
    '--seeds', type=whole, nargs='+', help='fewshot: draws of them; by default 0 1 2'
  )
  group.add_argument(
    '--l2',
    type=above_zero,
    help="fewshot: how much weights are held down; by default big_vision's 1024",
  )
  group.add_argument('--k', type=positive, help='knn: neighbours; by default 20')
  group.add_argument(
    '--mapping',
    metavar='DIR',
    help='objectnet: its own directory `mappings`; by default beside the images',
  )
