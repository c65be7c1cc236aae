"""Every table and figure of the paper: what makes it, what that needs and costs, and whether it can be had outside Google."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from vit_jax.config import Config, total_steps
from vit_jax.data.known import DATASET_SIZES
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.families import build_model
from vit_jax.paper import full
from vit_jax.paper.published import CELLS, cells, figure_13, number
from vit_jax.paper.runs import Run, chain, command, digest, sweep, workdir
from vit_jax.tpu.cost import MFU, chip_hours, exaflops
from vit_jax.tpu.topologies import GENERATIONS

NO_JFT = 'rests on JFT-300M: not reproducible outside Google; --standin puts ImageNet-21k, the nearest public set, in its place'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
  """A table or a figure. Without runs it is made by `command` alone."""

  title: str
  runs: Callable[[], list[Run]] | None = None  # At full scale.
  then: str = ''  # A command for each model that the runs end in; {run} is its directory.
  besides: dict[str, str] = dataclasses.field(
    default_factory=dict
  )  # Columns that no run of these makes -> their commands.
  mini: str = ''  # The experiment of mini.py that does it in miniature.
  command: str = ''
  needs: str = ''


FIGURES = 'python -m vit_jax figures --init {run}'  # Or a released checkpoint.
SPEED = 'python -m vit_jax tables fig12'
STUDENT = 'configs/noisy_student.py:L2'
NOISY_STUDENT = (
  'python -m vit_jax selftrain --teacher configs/noisy_student.py:B7 '
  f'--students {STUDENT},14 {STUDENT},14 {STUDENT},28 --workdir runs/noisy_student'
)
SELF = 'selfsupervision'
SAME = {'fig2': '9', 'fig3': '5', 'fig5': '6'}  # Figures whose runs are a table's.
imagenet_only = full.only_target('ImageNet')
ITEMS = {
  '2': Item(
    title='comparison with the state of the art, and its cost', runs=full.table_2, mini='transfer',
    besides={'Noisy Student EffNet-L2': NOISY_STUDENT},
  ),
  '3': Item(title='recipes of pre-training', command='configs/pretrain.py:VARIANT,DATA', needs='nothing: a table of settings'),
  '4': Item(title='recipes of fine-tuning', command='configs/finetune.py:VARIANT,DATA', needs='nothing: a table of settings'),
  '5': Item(title='top-1 accuracy after fine-tuning, by pre-training set', runs=full.table_5, mini='transfer'),
  '6': Item(title='ViT, ResNet and hybrid against compute', runs=full.table_6, mini='scaling'),
  '7': Item(title='ResNets pre-trained with Adam and with SGD', runs=full.table_7, mini='optimizers'),
  '8': Item(title='position embeddings', runs=full.table_8, mini='positions'),
  '9': Item(title='VTAB-1k, task by task', runs=full.table_9, mini='transfer'),
  'fig2': Item(title='VTAB-1k by group', runs=full.table_9, mini='transfer'),
  'fig3': Item(title='ImageNet accuracy by pre-training set', runs=imagenet_only(full.table_5), mini='data_size'),
  'fig4': Item(title='ImageNet 5-shot by the size of the pre-training set', runs=full.figure_4, mini='data_size'),
  'fig5': Item(title='accuracy against the compute of pre-training', runs=full.table_6, mini='scaling'),
  'fig6': Item(title='attention rollout over three images', command=FIGURES, needs='photographs'),
  'fig7': Item(title='embedding filters, position similarity, attention distance', command=FIGURES, needs='photographs'),
  'fig8': Item(title='the shape of a Transformer', runs=full.figure_8),
  'fig9': Item(title='a class token or the mean of the patches', runs=full.figure_9, mini='pooling'),
  'fig10': Item(title='position similarity under three recipes', runs=full.figure_10, then=FIGURES),
  'fig11': Item(title='attention distance by depth, with a ResNet stem and without', command=FIGURES, needs='photographs'),
  'fig12': Item(title='speed and largest batch by input size', command=SPEED, needs='the device to measure'),
  'fig13': Item(title='axial models', runs=full.figure_13),
  'fig14': Item(title='attention rollout over 128 images', command=FIGURES, needs='photographs'),
  SELF: Item(title='self-supervision by masked patches', runs=full.self_supervision, mini='masked_patches'),
}  # fmt: skip


def key_of(name: str) -> str:
  """The key that '5', 'table5', 'fig4' or 'figure4' names. UserError with the nearest."""
  short = name.lower().replace('figure', 'fig').removeprefix('table')
  if short not in ITEMS:
    raise UserError(
      f'tables {name}: the paper has no such table or figure here.{did_you_mean(short, ITEMS)}'
    )
  return short


def item(name: str) -> Item:
  """The one that is named."""
  return ITEMS[key_of(name)]


def title(name: str) -> str:
  """'Table 5', 'Figure 4' or '§4.6'."""
  short = key_of(name)
  if short == SELF:
    return '§4.6'
  return f'Figure {short[3:]}' if short.startswith('fig') else f'Table {short}'


def paper_cells(name: str) -> dict[tuple[str, str], str]:
  """What the paper has for the rows and columns of a table's runs; nothing where its figure has no such numbers."""
  key = key_of(name)
  if key == 'fig13':
    return figure_13()
  tables = {'2': ('table2', 'table9'), SELF: (SELF,)}.get(key, (f'table{SAME.get(key, key)}',))
  return {place: cell for table in tables if table in CELLS for place, cell in cells(table).items()}


def listing() -> list[tuple[str, ...]]:
  """(what, title, command, needs, status) of each."""
  rows = [('', 'what', 'command', 'needs', 'status')]
  for name, each in ITEMS.items():
    runs = each.runs() if each.runs else []
    here = f'python -m vit_jax tables {name}'
    words = ['in miniature here: --scale=mini'] if each.mini else []
    if runs:
      words += ['at full scale on a pod', *([NO_JFT] if full.rests_on_jft(runs) else [])]
    words += [f'{column}: {command}' for column, command in each.besides.items()]
    needs = each.needs or ', '.join(data_sets(runs))
    rows.append((title(name), each.title, each.command or here, needs, '; '.join(words) or 'here'))
  return rows


def every(runs: list[Run]) -> Iterator[Run]:
  """All runs that these want, in their order, each once: what they start from, their sweeps, themselves."""
  seen = set()
  for run in runs:
    steps = [*chain(run)]
    for each in [*steps[:-1], *(sweep(run) if run.swept else []), run]:
      if digest(each) not in seen:
        seen.add(digest(each))
        yield each


def data_sets(runs: list[Run]) -> list[str]:
  """What has to be there."""
  found = {}
  for run in every(runs):
    config = built(run)
    found |= dict.fromkeys(filter(None, (config.data.train, config.data.eval)))
    found |= dict.fromkeys('tfds:imagenet2012' for entry in config.probes)
  return [*found]


def built(run: Run) -> Config:
  """The config, starting from where it will."""
  return run.built('-' if run.init else '')


def cost(run: Run) -> float:
  """exaFLOPs of a run, told from its config."""
  config = built(run)
  examples, classes, _ = DATASET_SIZES[config.data.train]
  flops = build_model(config.model, classes).shape.flops(config.data.size)
  return exaflops(flops, total_steps(config, examples) * config.data.batch)


def short(value: float) -> str:
  """Three digits."""
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def dry_run(
  name: str, *, root: Path, standin: bool, chip: str = 'v5e', mfu: float = MFU
) -> Iterator[str]:
  """What would be done for a table or figure at full scale, line by line: commands, what they cost, what they need."""
  each, peak = item(name), GENERATIONS[chip].flops
  yield f'{title(name)}: {each.title}'
  if not each.runs:
    yield f'  {each.command}   (needs {each.needs})'
    return
  runs = [full.standin(run) if standin else run for run in each.runs()]
  if full.rests_on_jft(runs):
    yield f'  {NO_JFT}'
  yield f'  needs {", ".join(data_sets(runs))}'
  total, count, theirs = 0.0, 0, paper_cells(name)
  paper = lambda *place: (
    f' (the paper: {theirs[place]})' if number(theirs.get(place, '')) is not None else ''
  )
  for run in every(runs):
    exa = cost(run)
    total, count = total + exa, count + 1
    yield f'# {run.row}, {run.column}{paper(run.row, run.column)}' + (
      ': by the best of its sweep' if run.swept else ''
    )
    yield command(run, root)
    yield f'#   {short(exa)} exaFLOPs{paper(run.row, "exaFLOPs")}, {short(chip_hours(exa, peak, mfu))} chip-hours of {chip}'
  for last in dict.fromkeys(workdir(run, root) for run in runs if each.then):
    yield each.then.format(run=last)
  for column, besides in each.besides.items():
    yield f'# {column}: its cost is not counted here, and its unlabelled images are not public; see {STUDENT.partition(":")[0]}'
    yield besides
  hours = chip_hours(total, peak, mfu)
  yield f'{count} runs, {total:,.0f} exaFLOPs, {hours:,.0f} chip-hours of {chip} at {100 * mfu:.0f} % of its peak (an estimate)'
