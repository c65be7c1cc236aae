"""Every table and figure of the paper, and tables of later ones: commands, costs and needs."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from vit_jax.config import Config
from vit_jax.data.dataset_sizes import DATASET_SIZES
from vit_jax.errors import UserError, did_you_mean
from vit_jax.evaluate.label_sets import LABEL_SET_SOURCES
from vit_jax.evaluate.protocols import parse_protocol
from vit_jax.models.families import build_model
from vit_jax.optim.durations import total_steps
from vit_jax.paper import full_scale, later_papers
from vit_jax.paper.published import (
  ROW_NAMES,
  parse_first_number,
  read_figure_13_cells,
  read_published_cells,
)
from vit_jax.paper.runs import (
  ExperimentRun,
  format_run_command,
  init_chain,
  run_digest,
  run_workdir,
  sweep_candidates,
)
from vit_jax.tpu.cost import ASSUMED_MFU, chip_hours
from vit_jax.tpu.topologies import GENERATIONS
from vit_jax.training.program import training_flops
from vit_jax.training.teacher import describe_teacher

_NO_JFT_NOTE = (
  'uses JFT-300M: not reproducible outside Google; '
  '--standin uses ImageNet-21k, the nearest public set, instead'
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
  """A table or a figure. Without `make_runs`, `command` alone makes it."""

  title: str
  name: str = ''  # By default the table or figure of its key.
  make_runs: Callable[[], list[ExperimentRun]] | None = None  # At full scale.
  # A command for each model at the end of the runs. {run} stands for its directory.
  follow_up_command: str = ''
  # {column: command} of the columns that none of the runs makes.
  extra_commands: dict[str, str] = dataclasses.field(default_factory=dict)
  mini_experiment: str = ''  # The experiment of mini.py that makes it in miniature.
  command: str = ''
  needs: str = ''


_FIGURES_COMMAND = 'python -m vit_jax figures --init {run}'  # Or a released checkpoint.
_SPEED_COMMAND = 'python -m vit_jax tables fig12'
_STUDENT_CONFIG = 'configs/noisy_student.py:L2'
_NOISY_STUDENT_COMMAND = (
  'python -m vit_jax selftrain --teacher configs/noisy_student.py:B7 '
  f'--students {_STUDENT_CONFIG},14 {_STUDENT_CONFIG},14 {_STUDENT_CONFIG},28 '
  '--workdir runs/noisy_student'
)
_TABLE_OF_FIGURE = {'fig2': '9', 'fig3': '5', 'fig5': '6'}  # Figures with the runs of a table.
_imagenet_runs_only = full_scale.make_dataset_filter('ImageNet')
REPRODUCTIONS = {
  '2': Reproduction(
    title='comparison with the state of the art, and its cost',
    make_runs=full_scale.table_2_runs, mini_experiment='transfer',
    extra_commands={'Noisy Student EffNet-L2': _NOISY_STUDENT_COMMAND},
  ),
  '3': Reproduction(
    title='recipes of pre-training',
    command='configs/pretrain.py:VARIANT,DATA', needs='nothing: a table of settings',
  ),
  '4': Reproduction(
    title='recipes of fine-tuning',
    command='configs/finetune.py:VARIANT,DATA', needs='nothing: a table of settings',
  ),
  '5': Reproduction(
    title='top-1 accuracy after fine-tuning, by pre-training set',
    make_runs=full_scale.table_5_runs, mini_experiment='transfer',
  ),
  '6': Reproduction(
    title='ViT, ResNet and hybrid against compute',
    make_runs=full_scale.table_6_runs, mini_experiment='scaling',
  ),
  '7': Reproduction(
    title='ResNets pre-trained with Adam and with SGD',
    make_runs=full_scale.table_7_runs, mini_experiment='optimizers',
  ),
  '8': Reproduction(
    title='position embeddings',
    make_runs=full_scale.table_8_runs, mini_experiment='positions',
  ),
  '9': Reproduction(
    title='VTAB-1k, task by task',
    make_runs=full_scale.table_9_runs, mini_experiment='transfer',
  ),
  'fig2': Reproduction(
    title='VTAB-1k by group',
    make_runs=full_scale.table_9_runs, mini_experiment='transfer',
  ),
  'fig3': Reproduction(
    title='ImageNet accuracy by pre-training set',
    make_runs=_imagenet_runs_only(full_scale.table_5_runs), mini_experiment='data_size',
  ),
  'fig4': Reproduction(
    title='ImageNet 5-shot by the size of the pre-training set',
    make_runs=full_scale.figure_4_runs, mini_experiment='data_size',
  ),
  'fig5': Reproduction(
    title='accuracy against the compute of pre-training',
    make_runs=full_scale.table_6_runs, mini_experiment='scaling',
  ),
  'fig6': Reproduction(
    title='attention rollout over three images',
    command=_FIGURES_COMMAND, needs='photographs',
  ),
  'fig7': Reproduction(
    title='embedding filters, position similarity, attention distance',
    command=_FIGURES_COMMAND, needs='photographs',
  ),
  'fig8': Reproduction(title='the shape of a Transformer', make_runs=full_scale.figure_8_runs),
  'fig9': Reproduction(
    title='a class token or the mean of the patches',
    make_runs=full_scale.figure_9_runs, mini_experiment='pooling',
  ),
  'fig10': Reproduction(
    title='position similarity under three recipes',
    make_runs=full_scale.figure_10_runs, follow_up_command=_FIGURES_COMMAND,
  ),
  'fig11': Reproduction(
    title='attention distance by depth, with a ResNet stem and without',
    command=_FIGURES_COMMAND, needs='photographs',
  ),
  'fig12': Reproduction(
    title='speed and largest batch by input size',
    command=_SPEED_COMMAND, needs='the device to measure',
  ),
  'fig13': Reproduction(title='axial models', make_runs=full_scale.figure_13_runs),
  'fig14': Reproduction(
    title='attention rollout over 128 images',
    command=_FIGURES_COMMAND, needs='photographs',
  ),
  'selfsupervision': Reproduction(
    title='self-supervision by masked patches',
    name='§4.6', make_runs=full_scale.self_supervision_runs, mini_experiment='masked_patches',
  ),
  'augreg': Reproduction(
    title='accuracy on ImageNet by model, pre-training set and its length (arXiv 2106.10270)',
    name='Table 3 of augreg', make_runs=later_papers.augreg_runs,
  ),
  'plain_vit': Reproduction(
    title='S/16 on ImageNet and its ablations (arXiv 2205.01580)',
    name='Table 1 of plain ViT', make_runs=later_papers.plain_vit_runs,
  ),
  'sam': Reproduction(
    title='ViTs on ImageNet with AdamW, SAM and GSAM (arXiv 2106.01548, 2203.08065)',
    name='Table 1 of GSAM', make_runs=later_papers.sam_runs,
  ),
  'distill': Reproduction(
    title='BiT ResNets distilled on ImageNet (arXiv 2106.05237)',
    name='Results of distill', make_runs=later_papers.distill_runs,
  ),
}  # fmt: skip


def _parse_reproduction_key(name: str) -> str:
  """Return the key in REPRODUCTIONS of '5', 'table5', 'fig4' or 'figure4'.

  Raises UserError, with the nearest key, if there is none.
  """
  key = name.lower().replace('figure', 'fig').removeprefix('table')
  if key not in REPRODUCTIONS:
    hint = did_you_mean(key, REPRODUCTIONS)
    raise UserError(f'tables {name}: there is no such table or figure.{hint}')
  return key


def find_reproduction(name: str) -> Reproduction:
  """Return the entry of a table or figure.

  Raises UserError if there is none.
  """
  return REPRODUCTIONS[_parse_reproduction_key(name)]


def format_reproduction_title(name: str) -> str:
  """Return 'Table 5', 'Figure 4', '§4.6' or 'Table 3 of augreg'."""
  key = _parse_reproduction_key(name)
  default = f'Figure {key[3:]}' if key.startswith('fig') else f'Table {key}'
  return REPRODUCTIONS[key].name or default


def reproduction_paper_cells(name: str) -> dict[tuple[str, str], str]:
  """Return the paper's numbers for the rows and columns of a table's runs.

  The result is empty if the paper shows them only in a plot.
  """
  key = _parse_reproduction_key(name)
  if key == 'fig13':
    return read_figure_13_cells()
  number = _TABLE_OF_FIGURE.get(key, key)
  tables = [f'table{number}' if number.isdigit() else key]
  if key == '2':
    tables.append('table9')
  cells = {}
  for table in tables:
    if table in ROW_NAMES:
      cells |= read_published_cells(table)
  return cells


def list_reproductions() -> list[tuple[str, ...]]:
  """Return (name, title, command, needs, status) of each table and figure."""
  rows = []
  for key, item in REPRODUCTIONS.items():
    runs = item.make_runs() if item.make_runs else []
    status = ['in miniature here: --scale=mini'] if item.mini_experiment else []
    if runs:
      status.append('at full scale on a pod')
    if full_scale.uses_jft(runs):
      status.append(_NO_JFT_NOTE)
    status += [f'{column}: {command}' for column, command in item.extra_commands.items()]
    command = item.command or f'python -m vit_jax tables {key}'
    needs = item.needs or ', '.join(_required_datasets(runs))
    name = format_reproduction_title(key)
    rows.append((name, item.title, command, needs, '; '.join(status) or 'here'))
  return rows


def expand_runs(runs: list[ExperimentRun]) -> Iterator[ExperimentRun]:
  """Yield each run once, after the runs that it starts from and those of its sweep."""
  seen = set()
  for run in runs:
    *starts, _ = init_chain(run)
    for each in [*starts, *(sweep_candidates(run) if run.is_swept else []), run]:
      if run_digest(each) not in seen:
        seen.add(run_digest(each))
        yield each


def _required_datasets(runs: list[ExperimentRun]) -> list[str]:
  """Return the sources that the runs read, each once."""
  sources = {}
  for run in expand_runs(runs):
    config = _build_run_config(run)
    sources |= dict.fromkeys(filter(None, (config.data.train, config.data.eval)))
    for protocol, source in map(parse_protocol, config.probes):
      sources[source or LABEL_SET_SOURCES[protocol][0]] = None
  return [*sources]


def _build_run_config(run: ExperimentRun) -> Config:
  """Return the config of a run, with a placeholder for the checkpoint that it starts from."""
  return run.build_config('-' if run.init else '')


def run_exaflops(run: ExperimentRun) -> float:
  """Return the exaFLOPs of a run, computed from its config."""
  config = _build_run_config(run)
  examples, classes, _ = DATASET_SIZES[config.data.train]
  images = total_steps(config, examples) * config.data.batch
  model, teacher = build_model(config.model, classes), describe_teacher(config, classes)
  return training_flops(config, model, images, teacher) / 1e18


def _format_three_digits(value: float) -> str:
  """Format a number with three significant digits."""
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def format_dry_run(
  name: str, *, root: Path, standin: bool, chip: str = 'v5e', mfu: float = ASSUMED_MFU
) -> Iterator[str]:
  """Yield lines about a table or figure at full scale: its commands, their cost and their data.

  Args:
    name: the table or figure.
    root: directory of the runs.
    standin: use ImageNet-21k instead of JFT-300M.
    chip: TPU generation whose hours to estimate.
    mfu: model FLOPs utilization in [0, 1].
  """
  item, peak = find_reproduction(name), GENERATIONS[chip].flops
  yield f'{format_reproduction_title(name)}: {item.title}'
  if not item.make_runs:
    yield f'  {item.command}   (needs {item.needs})'
    return
  runs = [full_scale.replace_jft(run) if standin else run for run in item.make_runs()]
  if full_scale.uses_jft(runs):
    yield f'  {_NO_JFT_NOTE}'
  yield f'  needs {", ".join(_required_datasets(runs))}'
  total, count, cells = 0.0, 0, reproduction_paper_cells(name)
  for run in expand_runs(runs):
    cost = run_exaflops(run)
    total, count = total + cost, count + 1
    best = ': the best candidate of its sweep' if run.is_swept else ''
    hours = _format_three_digits(chip_hours(cost, peak, mfu))
    yield f'# {run.row}, {run.column}{_format_paper_cell(cells, run.row, run.column)}{best}'
    yield format_run_command(run, root)
    yield (
      f'#   {_format_three_digits(cost)} exaFLOPs{_format_paper_cell(cells, run.row, "exaFLOPs")}, '
      f'{hours} chip-hours of {chip}'
    )
  if item.follow_up_command:
    for workdir in dict.fromkeys(run_workdir(run, root) for run in runs):
      yield item.follow_up_command.format(run=workdir)
  for column, command in item.extra_commands.items():
    yield (
      f'# {column}: its cost is not counted here, and its unlabelled images are not public; '
      f'see {_STUDENT_CONFIG.partition(":")[0]}'
    )
    yield command
  yield (
    f'{count} runs, {total:,.0f} exaFLOPs, '
    f'{chip_hours(total, peak, mfu):,.0f} chip-hours of {chip} '
    f'at {100 * mfu:.0f} % of its peak (an estimate)'
  )


def _format_paper_cell(cells: dict[tuple[str, str], str], row: str, column: str) -> str:
  """Return ' (the paper: CELL)', or '' if the paper has no number there."""
  cell = cells.get((row, column), '')
  return f' (the paper: {cell})' if parse_first_number(cell) is not None else ''
