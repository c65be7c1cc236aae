"""evaluate --protocol vtab: a model fine-tuned on each of VTAB-1k's tasks, and the means of what comes of them."""

import json
from pathlib import Path

from vit_jax.cli.arguments import above_zero, batch_size, load_model, positive
from vit_jax.cli.results import STDOUT, format_table, write_output
from vit_jax.errors import UserError
from vit_jax.runtime.cluster import print_stderr

COLUMNS = ('task', 'group', 'accuracy', 'examples')
FLAGS = ('tasks', 'workdir', 'steps', 'train_batch', 'lr')  # That go with nothing else.


def vtab(args):
  """Fine-tunes on one task after the other; what was done of them in --workdir is not done again."""
  from vit_jax.data.vtab import VTAB_TASKS
  from vit_jax.errors import did_you_mean
  from vit_jax.evaluate.vtab import check_vtab_data, mean_by_group, vtab_config
  from vit_jax.train import train

  tasks = args.tasks or list(VTAB_TASKS)
  if unknown := [task for task in tasks if task not in VTAB_TASKS]:
    raise UserError(
      f'--tasks {unknown[0]}: VTAB has no such task.{did_you_mean(unknown[0], VTAB_TASKS)}'
    )
  check_vtab_data(tasks, args.dir)
  model = load_model(args)
  said = {'steps': args.steps, 'batch': args.train_batch, 'lr': args.lr}
  said = {name: value for name, value in said.items() if value is not None}
  reading = {
    'eval_batch': batch_size(args),
    'workers': args.workers,
    'threads': args.threads,
    'dir': args.dir,
  }
  results = {}
  for task in tasks:
    config = vtab_config(task, model=model.config, size=model.size, **said, **reading)
    config.init = args.init
    results[task] = train(config, Path(args.workdir or 'runs/vtab') / task)
    print_stderr(f'{task}: {results[task]["test_accuracy"]:.2%}')
  averages = mean_by_group({task: result['test_accuracy'] for task, result in results.items()})
  if args.json != STDOUT:
    print(
      f'{model.source} at {"x".join(map(str, model.size))} px\n{table(results, averages)}', end=''
    )
  accuracies = {
    task: {name: result[f'test_{name}'] for name in ('accuracy', 'examples')}
    for task, result in results.items()
  }
  write_output(
    json.dumps({'model': model.source, 'tasks': accuracies, 'means': averages}, indent=1) + '\n',
    args.json,
  )


def table(results: dict[str, dict], averages: dict[str, float]) -> str:
  """For the screen."""
  from vit_jax.data.vtab import VTAB_TASKS

  rows = [
    (
      VTAB_TASKS[task].title,
      VTAB_TASKS[task].group,
      f'{result["test_accuracy"]:.2%}',
      f'{result["test_examples"]:,}',
    )
    for task, result in results.items()
  ]
  return format_table(
    [
      COLUMNS,
      *rows,
      *((f'mean, {group}', '', f'{mean:.2%}', '') for group, mean in averages.items()),
    ]
  )


def add_vtab(command):
  """What goes with --protocol vtab."""
  group = command.add_argument_group('vtab', 'fine-tuning, by default as in Table 4 of the paper')
  group.add_argument(
    '--tasks', nargs='+', metavar='TASK', help='by default all 19: caltech101, cifar100, …'
  )
  group.add_argument(
    '--workdir', metavar='DIR', help='where the runs go, one a task; by default runs/vtab'
  )
  group.add_argument('--steps', type=positive, help='by default 2,500')
  group.add_argument('--train_batch', type=positive, help='by default 512')
  group.add_argument('--lr', type=above_zero, help='by default 0.01')
