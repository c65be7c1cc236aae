"""Runs of the tables of later papers at full scale.

- "How to train your ViT" (augreg, arXiv 2106.10270), Table 3.
- "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580), Tables 1 and 2.
- SAM (arXiv 2106.01548) and GSAM (arXiv 2203.08065), whose Table 1 has the numbers of both.
- "A good teacher is patient and consistent" (arXiv 2106.05237), as big_vision's README quotes it.
"""

from collections.abc import Iterator

from vit_jax.paper.published import parse_first_number, read_published_table
from vit_jax.paper.runs import ExperimentRun
from vit_jax.recipes import load_sweep_rates

_AUGREG = 'configs/augreg.py'
# Table 3: {column without the size: argument of configs/augreg.py}.
_AUGREG_PRETRAINING = {
  'i1k-300': 'imagenet', 'i21k-30': 'imagenet21k_30', 'i21k-300': 'imagenet21k',
}  # fmt: skip
_UPSTREAM = {'i1k-300': 'i1k-up at 224'}  # The column of a model before it is fine-tuned.
# {end of a column: (probe, its metric)}.
_TEST_SETS = {
  'ReaL': ('real', 'real/imagenet2012_top1'),
  'V2': ('v2', 'v2/matched-frequency_top1'),
  'ImageNet-R': ('r', 'r/imagenet_r_top1'),
}


def augreg_runs() -> list[ExperimentRun]:
  """Table 3 of augreg: pre-trained on ImageNet or ImageNet-21k, then fine-tuned on ImageNet.

  Each model has the augmentation that its authors recommend in big_vision. The paper has the best
  of 28 settings, and for the column 'by V2' that with the highest accuracy on ImageNet V2.
  """
  runs = []
  for model in (row['Model'] for row in read_published_table('augreg')):
    starts = {
      column: ExperimentRun(row=model, column=_UPSTREAM.get(column, column), config=config)
      for column, data in _AUGREG_PRETRAINING.items()
      for config in [f'{_AUGREG}:{model},{data}']
    }
    runs.append(starts['i1k-300'])
    runs += [
      _augreg_finetuning(start, model, f'{column} at {side}', side)
      for side in (224, 384)
      for column, start in starts.items()
    ]
  return runs


def _augreg_finetuning(start: ExperimentRun, model: str, column: str, side: int) -> ExperimentRun:
  """Return the fine-tuning on ImageNet at `side` pixels, with the better of two learning rates."""
  config = f'{_AUGREG}:{model},finetune_imagenet'
  return ExperimentRun(
    row=model,
    column=column,
    config=config,
    settings={'data.size': (side, side)},
    init=start,
    learning_rates=load_sweep_rates(config),
    held_out_from='99%',
  )


def plain_vit_runs() -> list[ExperimentRun]:
  """Tables 1 and 2 of the plain ViT baselines: S/16 and its ablations at three lengths."""
  runs = []
  for row in read_published_table('plain_vit'):
    change = '' if row['Change'] == 'none' else f',{row["Change"]}'
    for epochs in ('90', '150', '300'):
      config = f'configs/plain_vit.py:S/16,{epochs}{change}'
      columns = [column for column in row if column.startswith(f'{epochs} epochs')]
      runs += _runs_of_row(row, row['Change'], columns, config)
  return runs


def sam_runs() -> list[ExperimentRun]:
  """Table 1 of GSAM: Vision Transformers with AdamW alone, SAM and GSAM."""
  runs = []
  for row in read_published_table('sam'):
    config = f'configs/sam.py:{row["Model"]},{row["Rule"]}'
    columns = ['ImageNet', 'ImageNet ReaL', 'ImageNet V2', 'ImageNet-R']
    runs += _runs_of_row(row, f'{row["Model"]} {row["Rule"]}', columns, config)
  return runs


def distill_runs() -> list[ExperimentRun]:
  """Students of the longest schedule, at two sizes of images.

  Only the recipe at 224 pixels is published. At 160, images for evaluation are resized by as much.
  """
  students = [row for row in read_published_table('distill') if row['Role'] == 'student']
  return [
    ExperimentRun(
      row=f'{row["Model"]} at {side}',
      column='ImageNet',
      config=f'configs/distill.py:BiT-R152x2,{row["Model"]},imagenet,9600',
      settings={'data.size': (side, side), 'data.eval_short_side': side * 8 // 7},
    )
    for row in students
    for side in [int(row['Pixels'])]
  ]


def _runs_of_row(
  row: dict[str, str], name: str, columns: list[str], config: str
) -> Iterator[ExperimentRun]:
  """Yield a run for each of `columns` that has a number. They share one training run."""
  columns = [column for column in columns if parse_first_number(row[column]) is not None]
  ends = {column: _find_test_set(column) for column in columns}
  probes = tuple(_TEST_SETS[end][0] for end in ends.values() if end)
  for column, end in ends.items():
    yield ExperimentRun(
      row=name,
      column=column,
      config=config,
      settings={'probes': probes} if probes else {},
      measures=(_TEST_SETS[end][1],) if end else ('accuracy',),
    )


def _find_test_set(column: str) -> str:
  """Return the key of _TEST_SETS with which a column ends, or '' for ImageNet itself."""
  return next((end for end in _TEST_SETS if column.endswith(end)), '')
