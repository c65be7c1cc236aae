"""The command `evaluate --protocol vtab`: fine-tune a model on each task of VTAB-1k."""

import json
from pathlib import Path

from vit_jax.cli.arguments import eval_batch_size, load_model, positive_float, positive_int
from vit_jax.cli.results import STDOUT, format_table, write_output
from vit_jax.errors import UserError
from vit_jax.runtime.screen import print_stderr

_COLUMNS = ('task', 'group', 'accuracy', 'examples')
VTAB_FLAGS = ('tasks', 'workdir', 'steps', 'train_batch', 'lr')  # Only this protocol has them.


def evaluate_vtab(args):
  """Fine-tune on one task after another. Tasks that are complete in --workdir are not repeated."""
  from vit_jax.data.vtab import VTAB_TASKS
  from vit_jax.errors import did_you_mean
  from vit_jax.evaluate.vtab import check_vtab_data, mean_by_group, vtab_config
  from vit_jax.train import train

  tasks = args.tasks or list(VTAB_TASKS)
  if unknown := [task for task in tasks if task not in VTAB_TASKS]:
    hint = did_you_mean(unknown[0], VTAB_TASKS)
    raise UserError(f'--tasks {unknown[0]}: VTAB has no such task.{hint}')
  check_vtab_data(tasks, args.dir)
  model = load_model(args)
  settings = {'steps': args.steps, 'batch': args.train_batch, 'lr': args.lr}
  settings = {name: value for name, value in settings.items() if value is not None} | {
    'eval_batch': eval_batch_size(args),
    'workers': args.workers,
    'threads': args.threads,
    'dir': args.dir,
  }
  results = {}
  for task in tasks:
    config = vtab_config(task, model=model.config, size=model.size, **settings)
    config.init = args.init
    results[task] = train(config, Path(args.workdir or 'runs/vtab') / task)
    print_stderr(f'{task}: {results[task]["test_accuracy"]:.2%}')
  means = mean_by_group({task: result['test_accuracy'] for task, result in results.items()})
  if args.json != STDOUT:
    size = 'x'.join(map(str, model.size))
    print(f'{model.source} at {size} px\n{_format_results(results, means)}', end='')
  accuracies = {
    task: {name: result[f'test_{name}'] for name in ('accuracy', 'examples')}
    for task, result in results.items()
  }
  output = {'model': model.source, 'tasks': accuracies, 'means': means}
  write_output(json.dumps(output, indent=1) + '\n', args.json)


def _format_results(results: dict[str, dict], means: dict[str, float]) -> str:
  """Return the table of tasks, and of the means of groups."""
  from vit_jax.data.vtab import VTAB_TASKS

  rows = []
  for task, result in results.items():
    accuracy, examples = f'{result["test_accuracy"]:.2%}', f'{result["test_examples"]:,}'
    rows.append((VTAB_TASKS[task].title, VTAB_TASKS[task].group, accuracy, examples))
  rows += [(f'mean, {group}', '', f'{mean:.2%}', '') for group, mean in means.items()]
  return format_table([_COLUMNS, *rows])


def add_vtab_flags(command):
  """Add the flags of --protocol vtab."""
  group = command.add_argument_group('vtab', 'fine-tuning; the defaults are from Table 4')
  group.add_argument(
    '--tasks',
    nargs='+',
    metavar='TASK',
    help='tasks, such as caltech101 cifar100 (default: all 19)',
  )
  group.add_argument(
    '--workdir', metavar='DIR', help='directory of the runs, one per task (default: runs/vtab)'
  )
  group.add_argument('--steps', type=positive_int, help='number of steps (default: 2,500)')
  group.add_argument(
    '--train_batch', type=positive_int, help='training images in a batch (default: 512)'
  )
  group.add_argument('--lr', type=positive_float, help='peak learning rate (default: 0.01)')
