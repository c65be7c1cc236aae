"""The command `evaluate --protocol` with probes and label sets: a table, and JSON."""

import contextlib
import json
import sys

from vit_jax.cli.arguments import (
  SOURCE_KINDS,
  eval_batch_size,
  load_model,
  non_negative_int,
  positive_float,
  positive_int,
)
from vit_jax.cli.results import STDOUT, format_table, write_output
from vit_jax.cli.vtab import VTAB_FLAGS
from vit_jax.errors import UserError
from vit_jax.runtime.screen import print_stderr

# Repeated here so that --help does not import jax.
PROBES = ('fewshot', 'knn', 'linear')
LABEL_SETS = ('real', 'v2', 'a', 'r', 'objectnet')

_COLUMNS = ('protocol', 'on', 'accuracy', 'std', 'examples')
_PROTOCOL_OF_FLAG = {
  'shots': 'fewshot',
  'seeds': 'fewshot',
  'l2': 'fewshot',
  'k': 'knn',
  'mapping': 'objectnet',
} | dict.fromkeys(VTAB_FLAGS, 'vtab')


def evaluate_protocols(args):
  """Run the protocols of --protocol."""
  model = load_model(args)
  functions = [
    *_make_probe_protocols(args),
    *(_make_label_set_protocol(args, name, model) for name in args.protocol if name in LABEL_SETS),
  ]
  results = _run_protocols(args, model, functions)
  facts = {
    'model': model.source,
    'preprocessing': model.preprocessing.to_dict(),
    'notes': [*model.notes],
  }
  facts |= {'results': [_to_json_object(each) for each in results]}
  if args.json != STDOUT:
    print(f'{model.source}\n{_format_results(results)}', end='')
  write_output(json.dumps(facts, indent=1) + '\n', args.json)


def check_protocol_flags(args):
  """Check that all flags belong to a selected protocol, and that --data is given where needed."""
  for name in ('classify', 'vtab'):
    if name in args.protocol and len(args.protocol) > 1:
      raise UserError(
        f'--protocol {" ".join(args.protocol)}: {name} cannot be combined with others'
      )
  for flag, protocol in _PROTOCOL_OF_FLAG.items():
    if getattr(args, flag) is not None and protocol not in args.protocol:
      raise UserError(f'--{flag} needs --protocol {protocol}')
  if not args.data and set(args.protocol) & {*PROBES, 'classify'}:
    raise UserError(f'--data is missing: one of {SOURCE_KINDS}')
  for flag in ('per_class', 'confusion', 'report'):
    if getattr(args, flag) and args.protocol != ['classify']:
      raise UserError(f'--{flag} needs --protocol classify')
  if args.train_split and not set(args.protocol) & set(PROBES):
    raise UserError(f'--train_split needs --protocol {", ".join(PROBES)}')


def _run_protocols(args, model, functions: list) -> list:
  """Return the results of all protocols. Raises UserError if a class has no examples."""
  from vit_jax.evaluate.evaluator import make_pretrained_evaluator
  from vit_jax.evaluate.predict import eval_data_config

  data = eval_data_config(model, batch=eval_batch_size(args), **data_options(args))
  with image_progress_bar() as bar, explain_bad_images():
    evaluator, params = make_pretrained_evaluator(model, data, on_batch=bar.update)
    results = [result for run in functions for result in run(evaluator, params)]
  for each in results:
    if each.skipped:
      print_stderr(f'{each.protocol}: skipped {each.skipped:,} images without a correct class')
    if not each.scores:
      raise UserError(f'{each.protocol} on {each.data}: a class has no example to learn from')
  return results


def _make_probe_protocols(args) -> list:
  """Return the function that runs the selected probes, or none."""
  from vit_jax.evaluate import fewshot, knn, probes, protocols

  selected = [name for name in args.protocol if name in PROBES]
  if not selected:
    return []
  pool, test = probes.open_pool_and_test(
    args.data, split=args.train_split, test_split=args.split, dir=args.dir
  )
  options = probes.ProbeOptions(
    shots=tuple(args.shots or ()),
    seeds=tuple(args.seeds or fewshot.FEWSHOT_SEEDS),
    l2=args.l2 or fewshot.FEWSHOT_L2,
    k=args.k or knn.KNN_NEIGHBORS,
  )
  return [protocols.make_probe_protocol(selected, args.data, pool, test, options)]


def _make_label_set_protocol(args, protocol: str, model):
  """Return the function that evaluates one of the label sets of ImageNet."""
  from vit_jax.evaluate import protocols
  from vit_jax.evaluate.predict import check_trained_head

  check_trained_head(model)
  return protocols.make_label_set_protocol(
    protocol,
    args.data or '',
    labels=model.labels,
    classes=model.classes,
    source=model.source,
    split=args.split,
    dir=args.dir,
    mapping=args.mapping or '',
  )


def data_options(args) -> dict[str, object]:
  """Return the flags that are fields of `DataConfig`."""
  return {name: getattr(args, name) for name in ('workers', 'threads', 'bad_images')}


def image_progress_bar(total: int | None = None):
  """Return a progress bar that counts images. It is shown only on a terminal."""
  import tqdm

  return tqdm.tqdm(
    total=total,
    unit='image',
    dynamic_ncols=True,
    leave=False,
    disable=not sys.stderr.isatty(),
  )


@contextlib.contextmanager
def explain_bad_images():
  """Turn an unreadable image into a UserError with a remedy."""
  from vit_jax.data.decode import BadImageError

  try:
    yield
  except BadImageError as error:
    name, reason = error.args
    raise UserError(
      f'{name}: {reason}. Replace or remove the file, or skip such files with --bad_images skip'
    ) from None


def _to_json_object(result) -> dict:
  return {
    'protocol': result.protocol,
    'data': result.data,
    'examples': result.examples,
    'skipped': result.skipped,
    'pool': result.pool_examples,
    'figures': {
      name: {'accuracy': score.accuracy, 'std': score.std, 'note': score.note}
      for name, score in result.scores.items()
    },
  }


def _format_results(results: list) -> str:
  """Return the table of all scores."""
  rows = []
  for each in results:
    for name, score in each.scores.items():
      std = '' if score.std is None else f'{score.std:.2%}'
      accuracy, examples = f'{score.accuracy:.2%}', f'{each.examples:,}'
      rows.append((f'{each.protocol} {name}', each.data, accuracy, std, examples))
  return format_table([_COLUMNS, *rows])


def add_protocol_flags(command):
  """Add --protocol and the flags of probes and label sets."""
  names = ('classify', 'vtab', *PROBES, *LABEL_SETS)
  command.add_argument(
    '--protocol',
    nargs='+',
    default=['classify'],
    choices=names,
    metavar='NAME',
    help=f'classify (default), vtab, or any of {", ".join((*PROBES, *LABEL_SETS))}',
  )
  group = command.add_argument_group('protocols', 'options of some protocols')
  group.add_argument(
    '--train_split', default='', help=f'{", ".join(PROBES)}: split to learn from (default: train)'
  )
  group.add_argument(
    '--shots',
    type=positive_int,
    nargs='+',
    help='fewshot: examples per class (default: 1 5 10 25)',
  )
  group.add_argument(
    '--seeds', type=non_negative_int, nargs='+', help='fewshot: seeds (default: 0 1 2)'
  )
  group.add_argument(
    '--l2', type=positive_float, help='fewshot: L2 regularization (default: 1024, as big_vision)'
  )
  group.add_argument('--k', type=positive_int, help='knn: neighbours (default: 20)')
  group.add_argument(
    '--mapping',
    metavar='DIR',
    help="objectnet: directory 'mappings' of its archive (default: beside the images)",
  )
