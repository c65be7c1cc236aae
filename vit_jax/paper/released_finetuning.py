"""Table 5 from Google's released ImageNet-21k checkpoints, fine-tuned by Table 4's recipe.

The comparison has the paper's numbers, and those of the authors' released code at dropout 0 (their
README).
"""

from collections.abc import Callable

from vit_jax.errors import UserError, did_you_mean
from vit_jax.paper.full_scale import FINETUNE_CONFIG, TRANSFER_DATASETS, parse_paper_variant
from vit_jax.paper.published import read_published_table
from vit_jax.paper.results_page import TableCells, format_markdown_cells, summarize_records
from vit_jax.paper.runs import ExperimentRun, repeat_over_seeds

_DATASET_OF_ARGUMENT = {argument: name for name, (argument, _) in TRANSFER_DATASETS.items()}
_RELEASED_MODELS = {
  'B/16': 'imagenet21k/ViT-B_16',
  'B/32': 'imagenet21k/ViT-B_32',
  'L/16': 'imagenet21k/ViT-L_16',
  'L/32': 'imagenet21k/ViT-L_32',
  'H/14': 'imagenet21k/ViT-H_14',
  'R50+B/16': 'imagenet21k/R50+ViT-B_16',
}


def released_finetune_runs(
  pairs: list[str], read_settings: Callable[[str], dict[str, object]], seeds: tuple[int, ...]
) -> list[ExperimentRun]:
  """Return the runs that fine-tune a released model for each 'VARIANT,DATA'.

  Args:
    pairs: 'VARIANT,DATA' strings; all of Table 5 if empty.
    read_settings: returns the settings of the user that differ from those of FILE:ARGUMENT.
    seeds: seeds of each run.

  Raises:
    UserError: Table 5 has no such variant or data.
  """
  runs = []
  for pair in pairs or [
    f'{model},{data}' for model in _RELEASED_MODELS for data in _DATASET_OF_ARGUMENT
  ]:
    model, _, data = pair.partition(',')
    for name, known in ((model, _RELEASED_MODELS), (data, _DATASET_OF_ARGUMENT)):
      if name not in known:
        raise UserError(
          f'--only {pair}: expected VARIANT,DATA, but Table 5 has no {name!r}.'
          f'{did_you_mean(name, known)}'
        )
    config = f'{FINETUNE_CONFIG}:{pair}'
    settings = read_settings(config)
    init = settings.pop('init', '') or _RELEASED_MODELS[model]
    runs.append(
      ExperimentRun(
        row=model, column=_DATASET_OF_ARGUMENT[data], config=config, settings=settings, init=init
      )
    )
  return repeat_over_seeds(runs, seeds)


def format_released_comparison(records: list[dict]) -> str:
  """Return a Markdown table of the paper, its authors' code, and our results."""
  mine = summarize_records(records)
  paper = {
    (parse_paper_variant(model), row['Transfer to']): row[model]
    for row in read_published_table('table5')
    for model in row
    if row['Pre-train'] == 'ImageNet-21k'
  }
  code = {
    (row['Model'], row['Dataset']): row['dropout 0.0'] for row in read_published_table('readme')
  }
  cells: TableCells = {}
  for model, data in mine:
    row = f'{model}, {data}'
    cells |= {
      (row, 'paper'): paper.get((model, data), ''),
      (row, 'released code'): code.get((model, data), ''),
    }
    cells[row, 'ours'] = mine[model, data]
  return format_markdown_cells(cells)
