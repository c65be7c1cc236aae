"""Every table and figure of the paper: what makes it, what that needs and costs, and whether it can be had outside Google."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from vit_jax.config import Config, total_steps
from vit_jax.data.dataset_sizes import DATASET_SIZES
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.families import build_model
from vit_jax.paper import full_scale
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
from vit_jax.tpu.cost import MFU, chip_hours, exaflops
from vit_jax.tpu.topologies import GENERATIONS

_NO_JFT_NOTE = 'rests on JFT-300M: not reproducible outside Google; --standin puts ImageNet-21k, the nearest public set, in its place'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
  """A table or a figure. Without runs it is made by `format_run_command` alone."""

  title: str
  runs: Callable[[], list[ExperimentRun]] | None = None  # At full scale.
  then: str = ''  # A command for each model that the runs end in; {run} is its directory.
  besides: dict[str, str] = dataclasses.field(
    default_factory=dict
  )  # Columns that no run of these makes -> their commands.
  mini: str = ''  # The experiment of mini.py that does it in miniature.
  command: str = ''
  needs: str = ''


_FIGURES_COMMAND = 'python -m vit_jax figures --init {run}'  # Or a released checkpoint.
_SPEED_COMMAND = 'python -m vit_jax tables fig12'
_STUDENT_CONFIG = 'configs/noisy_student.py:L2'
_NOISY_STUDENT_COMMAND = (
  'python -m vit_jax selftrain --teacher configs/noisy_student.py:B7 '
  f'--students {_STUDENT_CONFIG},14 {_STUDENT_CONFIG},14 {_STUDENT_CONFIG},28 --workdir runs/noisy_student'
)
_SELF_SUPERVISION = 'selfsupervision'
_TABLE_OF_FIGURE = {'fig2': '9', 'fig3': '5', 'fig5': '6'}  # Figures whose runs are a table's.
_imagenet_runs_only = full_scale.make_dataset_filter('ImageNet')
REPRODUCTIONS = {
  '2': Reproduction(
    title='comparison with the state of the art, and its cost', runs=full_scale.table_2_runs, mini='transfer',
    besides={'Noisy Student EffNet-L2': _NOISY_STUDENT_COMMAND},
  ),
  '3': Reproduction(title='recipes of pre-training', command='configs/pretrain.py:VARIANT,DATA', needs='nothing: a table of settings'),
  '4': Reproduction(title='recipes of fine-tuning', command='configs/finetune.py:VARIANT,DATA', needs='nothing: a table of settings'),
  '5': Reproduction(title='top-1 accuracy after fine-tuning, by pre-training set', runs=full_scale.table_5_runs, mini='transfer'),
  '6': Reproduction(title='ViT, ResNet and hybrid against compute', runs=full_scale.table_6_runs, mini='scaling'),
  '7': Reproduction(title='ResNets pre-trained with Adam and with SGD', runs=full_scale.table_7_runs, mini='optimizers'),
  '8': Reproduction(title='position embeddings', runs=full_scale.table_8_runs, mini='positions'),
  '9': Reproduction(title='VTAB-1k, task by task', runs=full_scale.table_9_runs, mini='transfer'),
  'fig2': Reproduction(title='VTAB-1k by group', runs=full_scale.table_9_runs, mini='transfer'),
  'fig3': Reproduction(title='ImageNet accuracy by pre-training set', runs=_imagenet_runs_only(full_scale.table_5_runs), mini='data_size'),
  'fig4': Reproduction(title='ImageNet 5-shot by the size of the pre-training set', runs=full_scale.figure_4_runs, mini='data_size'),
  'fig5': Reproduction(title='accuracy against the compute of pre-training', runs=full_scale.table_6_runs, mini='scaling'),
  'fig6': Reproduction(title='attention rollout over three images', command=_FIGURES_COMMAND, needs='photographs'),
  'fig7': Reproduction(title='embedding filters, position similarity, attention distance', command=_FIGURES_COMMAND, needs='photographs'),
  'fig8': Reproduction(title='the shape of a Transformer', runs=full_scale.figure_8_runs),
  'fig9': Reproduction(title='a class token or the mean of the patches', runs=full_scale.figure_9_runs, mini='pooling'),
  'fig10': Reproduction(title='position similarity under three recipes', runs=full_scale.figure_10_runs, then=_FIGURES_COMMAND),
  'fig11': Reproduction(title='attention distance by depth, with a ResNet stem and without', command=_FIGURES_COMMAND, needs='photographs'),
  'fig12': Reproduction(title='speed and largest batch by input size', command=_SPEED_COMMAND, needs='the device to measure'),
  'fig13': Reproduction(title='axial models', runs=full_scale.figure_13_runs),
  'fig14': Reproduction(title='attention rollout over 128 images', command=_FIGURES_COMMAND, needs='photographs'),
  _SELF_SUPERVISION: Reproduction(title='self-supervision by masked patches', runs=full_scale.self_supervision_runs, mini='masked_patches'),
}  # fmt: skip


def _parse_reproduction_key(name: str) -> str:
  """The key that '5', 'table5', 'fig4' or 'figure4' names. UserError with the nearest."""
  short = name.lower().replace('figure', 'fig').removeprefix('table')
  if short not in REPRODUCTIONS:
    raise UserError(
      f'tables {name}: the paper has no such table or figure here.{did_you_mean(short, REPRODUCTIONS)}'
    )
  return short


def find_reproduction(name: str) -> Reproduction:
  """The one that is named."""
  return REPRODUCTIONS[_parse_reproduction_key(name)]


def format_reproduction_title(name: str) -> str:
  """'Table 5', 'Figure 4' or '§4.6'."""
  short = _parse_reproduction_key(name)
  if short == _SELF_SUPERVISION:
    return '§4.6'
  return f'Figure {short[3:]}' if short.startswith('fig') else f'Table {short}'


def reproduction_paper_cells(name: str) -> dict[tuple[str, str], str]:
  """What the paper has for the rows and columns of a table's runs; nothing where its figure has no such numbers."""
  key = _parse_reproduction_key(name)
  if key == 'fig13':
    return read_figure_13_cells()
  tables = {'2': ('table2', 'table9'), _SELF_SUPERVISION: (_SELF_SUPERVISION,)}.get(
    key, (f'table{_TABLE_OF_FIGURE.get(key, key)}',)
  )
  return {
    place: cell
    for table in tables
    if table in ROW_NAMES
    for place, cell in read_published_cells(table).items()
  }


def list_reproductions() -> list[tuple[str, ...]]:
  """(what, title, command, needs, status) of each."""
  rows = [('', 'what', 'command', 'needs', 'status')]
  for name, each in REPRODUCTIONS.items():
    runs = each.runs() if each.runs else []
    here = f'python -m vit_jax tables {name}'
    words = ['in miniature here: --scale=mini'] if each.mini else []
    if runs:
      words += ['at full scale on a pod', *([_NO_JFT_NOTE] if full_scale.uses_jft(runs) else [])]
    words += [f'{column}: {command}' for column, command in each.besides.items()]
    needs = each.needs or ', '.join(_required_datasets(runs))
    rows.append(
      (
        format_reproduction_title(name),
        each.title,
        each.command or here,
        needs,
        '; '.join(words) or 'here',
      )
    )
  return rows


def expand_runs(runs: list[ExperimentRun]) -> Iterator[ExperimentRun]:
  """All runs that these want, in their order, each once: what they start from, their sweeps, themselves."""
  seen = set()
  for run in runs:
    steps = [*init_chain(run)]
    for each in [*steps[:-1], *(sweep_candidates(run) if run.is_swept else []), run]:
      if run_digest(each) not in seen:
        seen.add(run_digest(each))
        yield each


def _required_datasets(runs: list[ExperimentRun]) -> list[str]:
  """What has to be there."""
  found = {}
  for run in expand_runs(runs):
    config = _build_run_config(run)
    found |= dict.fromkeys(filter(None, (config.data.train, config.data.eval)))
    found |= dict.fromkeys('tfds:imagenet2012' for entry in config.probes)
  return [*found]


def _build_run_config(run: ExperimentRun) -> Config:
  """The config, starting from where it will."""
  return run.build_config('-' if run.init else '')


def run_exaflops(run: ExperimentRun) -> float:
  """exaFLOPs of a run, told from its config."""
  config = _build_run_config(run)
  examples, classes, _ = DATASET_SIZES[config.data.train]
  flops = build_model(config.model, classes).shape.flops(config.data.size)
  return exaflops(flops, total_steps(config, examples) * config.data.batch)


def _format_three_digits(value: float) -> str:
  """Three digits."""
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def format_dry_run(
  name: str, *, root: Path, standin: bool, chip: str = 'v5e', mfu: float = MFU
) -> Iterator[str]:
  """What would be done for a table or figure at full scale, line by line: commands, what they cost, what they need."""
  each, peak = find_reproduction(name), GENERATIONS[chip].flops
  yield f'{format_reproduction_title(name)}: {each.title}'
  if not each.runs:
    yield f'  {each.command}   (needs {each.needs})'
    return
  runs = [full_scale.replace_jft(run) if standin else run for run in each.runs()]
  if full_scale.uses_jft(runs):
    yield f'  {_NO_JFT_NOTE}'
  yield f'  needs {", ".join(_required_datasets(runs))}'
  total, count, theirs = 0.0, 0, reproduction_paper_cells(name)
  paper = lambda *place: (
    f' (the paper: {theirs[place]})'
    if parse_first_number(theirs.get(place, '')) is not None
    else ''
  )
  for run in expand_runs(runs):
    exa = run_exaflops(run)
    total, count = total + exa, count + 1
    yield f'# {run.row}, {run.column}{paper(run.row, run.column)}' + (
      ': by the best of its sweep' if run.is_swept else ''
    )
    yield format_run_command(run, root)
    yield f'#   {_format_three_digits(exa)} exaFLOPs{paper(run.row, "exaFLOPs")}, {_format_three_digits(chip_hours(exa, peak, mfu))} chip-hours of {chip}'
  for last in dict.fromkeys(run_workdir(run, root) for run in runs if each.then):
    yield each.then.format(run=last)
  for column, besides in each.besides.items():
    yield f'# {column}: its cost is not counted here, and its unlabelled images are not public; see {_STUDENT_CONFIG.partition(":")[0]}'
    yield besides
  hours = chip_hours(total, peak, mfu)
  yield f'{count} runs, {total:,.0f} exaFLOPs, {hours:,.0f} chip-hours of {chip} at {100 * mfu:.0f} % of its peak (an estimate)'
