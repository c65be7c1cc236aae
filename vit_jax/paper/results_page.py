"""Write results/README.md: tables and plots of the miniatures, next to the paper's numbers."""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

from vit_jax.paper.findings import MINI_CLAIMS, NOT_RUN
from vit_jax.paper.mini import (
  FEWSHOT_METRIC,
  HELD_OUT_PERCENT,
  SWEEP,
  MiniEffort,
  select_mini_runs,
)
from vit_jax.paper.plots import MINI_PLOTS, save_mini_plot
from vit_jax.paper.published import read_published_table
from vit_jax.paper.runner import read_records_csv
from vit_jax.paper.runs import run_digest
from vit_jax.recipes import load_recipe

TableCells = dict[tuple[str, str], str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PageSection:
  """The section of one experiment: the paper's claim, our tables, and the paper's own table."""

  title: str
  claim: str  # The paper's finding.
  design: str  # What we run, and which reason for another result it tests.
  measures: dict[str, str]  # {measure: caption of our table}
  read_paper_cells: Callable[[], TableCells] | None = None
  paper_caption: str = ''  # Caption of the paper's table.
  by_step: bool = False  # The columns are fractions of the run.


def _table_cells_reader(name: str, row: str, columns: list[str]) -> Callable[[], TableCells]:
  """Return a function that reads columns of a published table. `row` is the column of row names."""
  return lambda: {
    (each[row], column): each[column] for each in read_published_table(name) for column in columns
  }


def _figure_4_cells() -> TableCells:
  """Return Figure 4: few-shot accuracy by model and part of JFT-300M."""
  sizes = {'9.06': '3 %', '30.2': '10 %', '90.6': '30 %', '302': 'all 302M'}
  return {
    (row['model'], sizes[row['n_jft_millions']]): row['imagenet_5shot_pct']
    for row in read_published_table('fig4')
  }


def _table_6_cells() -> TableCells:
  """Return some columns of Table 6."""
  columns = ('exaFLOPs', 'ImageNet', 'CIFAR-10', 'CIFAR-100')
  return {
    (f'{row["Model"]}, {row["Epochs"]} epochs', name): row[name]
    for row in read_published_table('table6')
    for name in columns
  }


def _figure_9_cells() -> TableCells:
  """Return Figure 9 at the epochs nearest to quarters of the run."""
  rows, wanted = read_published_table('fig9'), {'25 %': 1.75, '50 %': 3.5, '75 %': 5.25, '100 %': 7}
  near = lambda series, epoch: min(
    (row for row in rows if row['series'] == series),
    key=lambda row: abs(float(row['epoch']) - epoch),
  )
  series = dict.fromkeys(row['series'] for row in rows)
  return {
    (name, share): near(name, epoch)['imagenet_5shot_pct']
    for name in series
    for share, epoch in wanted.items()
  }


def _table_5_cells() -> TableCells:
  """Return some rows and models of Table 5."""
  sets = {'ImageNet': '1.3M images', 'ImageNet-21k': '14M', 'JFT-300M': '303M'}
  wanted = ('ImageNet', 'CIFAR-10', 'Oxford-IIIT-Pets')
  return {
    (f'{model} from {row["Pre-train"]} ({sets[row["Pre-train"]]})', row['Transfer to']): row[model]
    for model in ('ViT-B/16', 'ViT-L/16')
    for row in read_published_table('table5')
    if row['Transfer to'] in wanted
  }


def _self_supervision_cells() -> TableCells:
  """Return §4.6: ImageNet accuracy by pre-training."""
  rows = read_published_table('selfsupervision')
  return {(row['Pre-training'], row['Model']): row['ImageNet'] for row in rows}


_ACCURACY_AND_FEWSHOT = {
  'accuracy': 'Test accuracy, %',
  FEWSHOT_METRIC: 'Digits, 5-shot linear on the frozen features, %',
}
PAGE_SECTIONS = {
  SWEEP: PageSection(
    title='Learning rates (Table 3)',
    claim='Larger models have lower learning rates: 8e-4 for ViT-B on JFT-300M, 3e-4 for ViT-H.',
    design=(
      f'Each model is trained for a quarter of the steps and evaluated on {HELD_OUT_PERCENT} % of '
      'the training images, which are held out. The best rate is used for all other runs.'
    ),
    measures={'accuracy': 'Accuracy on held-out images of CIFAR-10, %, first seed only'},
  ),
  'data_size': PageSection(
    title='Experiment 2: the size of the pre-training set (Figures 3 and 4)',
    claim=(
      'ResNets are more accurate with little pre-training data and level off. '
      'Vision Transformers overtake them with more.'
    ),
    design=(
      'Every part of the data is trained on for the same number of steps, so a sixteenth is seen '
      '16 times as often. The larger model shows whether size or data is the limit.'
    ),
    measures=_ACCURACY_AND_FEWSHOT,
    read_paper_cells=_figure_4_cells,
    paper_caption='Figure 4: ImageNet 5-shot, %, by the part of JFT-300M',
  ),
  'scaling': PageSection(
    title='Experiment 3: accuracy against compute (Table 6, Figure 5)',
    claim=(
      'Vision Transformers need 2 to 4 times less compute than ResNets for the same accuracy. '
      'Hybrids are more accurate than Vision Transformers at small compute, '
      'and no longer at large compute.'
    ),
    design=(
      'Sizes at three lengths of training, on all of CIFAR-10. If a larger model is less accurate '
      'because it is trained for too few steps, its disadvantage shrinks with the steps.'
    ),
    measures=_ACCURACY_AND_FEWSHOT,
    read_paper_cells=_table_6_cells,
    paper_caption='Table 6: pre-training on JFT-300M',
  ),
  'resolution': PageSection(
    title='Fine-tuning at a higher resolution (§3.2)',
    claim='A higher resolution in fine-tuning helps; the paper goes from 224 to 384 or 512 pixels.',
    design=(
      'Models are pre-trained on CIFAR-10 at 16 or 32 pixels and fine-tuned at the same resolution '
      'or one and a half times of it. Images of CIFAR-10 have 32 pixels: from 16 to 24 there is '
      'more detail to see, from 32 to 48 there is none, and in photos there is more. If a higher '
      'resolution hurts for lack of detail, it hurts only where there is none; if for lack of '
      'steps, it hurts less after more steps.'
    ),
    measures={'accuracy': 'Test accuracy after fine-tuning, %'},
  ),
  'transfer': PageSection(
    title='Experiment 1: transfer (Tables 2, 5 and 9)',
    claim='More pre-training data transfers better, most of all for larger models.',
    design=(
      'Models pre-trained on all of CIFAR-10 and on a sixteenth, for the same number of steps, are '
      'fine-tuned on digits, on a part of Fashion-MNIST and on photos. If more data is worse on '
      'digits because they are unlike photos, the other targets show it.'
    ),
    measures={'accuracy': 'Test accuracy after fine-tuning, %'},
    read_paper_cells=_table_5_cells,
    paper_caption='Table 5, at 384 px, %',
  ),
  'pooling': PageSection(
    title='A class token or the mean of the patches (Figure 9)',
    claim='Both are equally accurate, but need different learning rates.',
    design=(
      'The mean of the patches has a sweep of its own. If one of the two is ahead only because '
      'training is short, the difference shrinks over the run.'
    ),
    measures={
      'accuracy': 'Test accuracy, %, by the fraction of the run',
      FEWSHOT_METRIC: 'Digits 5-shot, %, by the fraction of the run',
    },
    read_paper_cells=_figure_9_cells,
    paper_caption='Figure 9: ImageNet 5-shot, %, by the fraction of seven epochs',
    by_step=True,
  ),
  'masked_patches': PageSection(
    title='Self-supervision by masked patches (§4.6, Appendix B.1.2)',
    claim=(
      'Two points better than training from scratch, '
      'and four points worse than supervised pre-training.'
    ),
    design=(
      'Masked patches of all images of CIFAR-10 are predicted without labels. Then the labels of a '
      'part are used, for a quarter of the steps, after that or from scratch.'
    ),
    measures={'accuracy': 'Test accuracy after training with the labels of a part, %'},
    read_paper_cells=_self_supervision_cells,
    paper_caption='ImageNet top-1 after fine-tuning, %, by the pre-training',
  ),
  'positions': PageSection(
    title='Position embeddings (Table 8)',
    claim=(
      'A model without position embeddings loses three points. '
      'Their kind, and where they are added, hardly matter.'
    ),
    design=(
      'All kinds for a quarter of the steps, and the two extremes for all steps. If positions '
      'matter less because training is short, the difference grows.'
    ),
    measures=_ACCURACY_AND_FEWSHOT,
    read_paper_cells=_table_cells_reader(
      'table8', 'Position embedding', ['Stem only', 'Every layer', 'Every layer shared']
    ),
    paper_caption='Table 8: ImageNet 5-shot of ViT-B/16, as a fraction',
  ),
  'optimizers': PageSection(
    title='ResNets with Adam and with SGD (Table 7)',
    claim=(
      'Adam is slightly better than SGD on average, so the paper pre-trains its ResNets with Adam.'
    ),
    design=(
      'Each optimizer has a sweep of its own. The paper compares after fine-tuning. If Adam is '
      'worse only on frozen features, fine-tuning shows it.'
    ),
    measures=_ACCURACY_AND_FEWSHOT,
    read_paper_cells=_table_cells_reader(
      'table7', 'Dataset', ['R50 Adam', 'R50 SGD', 'R152x2 Adam', 'R152x2 SGD']
    ),
    paper_caption='Table 7, after fine-tuning, %',
  ),
}


def write_results_page(out: Path, effort: MiniEffort) -> Path:
  """Write README.md and the plots of all miniatures from the CSVs in `out`; return its path.

  Cells, claims and seeds without results are marked, so it can be written at any time.
  """
  found = {}
  for name in PAGE_SECTIONS:
    path = out / f'mini_{name}.csv'
    planned = {run_digest(run) for run in select_mini_runs(name, effort, effort.seeds)}
    records = read_records_csv(path) if path.is_file() else []
    found[name] = [record for record in records if record['digest'] in planned]
  parts = [_format_introduction(found, effort)]
  for name, records in found.items():
    if records:
      save_mini_plot(MINI_PLOTS[name], records, out / f'mini_{name}.png')
    parts.append(_format_section(name, records, effort))
  parts += _format_other_pages(out)
  path = out / 'README.md'
  path.write_text('\n'.join(parts), encoding='utf-8')
  return path


def _format_introduction(found: dict[str, list[dict]], effort: MiniEffort) -> str:
  """Return the head of the page: the command, the design, the runs, and the verdicts."""
  runs = {record['digest']: record for records in found.values() for record in records}
  planned = {
    run_digest(run) for name in found for run in select_mini_runs(name, effort, effort.seeds)
  }
  hours = sum(float(record['hours']) for record in runs.values())
  names = {key: sorted({run[key] for run in runs.values()}) for key in ('device', 'commit', 'seed')}
  flags = {'cifar10': 'cifar10', 'fashion_mnist': 'fashion_mnist', 'flowers': 'photos'}
  command = f'python -m vit_jax tables mini --effort={effort.step_factor:g}'
  command += f' --seeds={len(effort.seeds)}'
  command += ''.join(f' --{flags[name]}={source}' for name, source in effort.sources.items())
  verdicts = ''.join(
    f'| {claim.text} | {claim.verdict} | {claim.numbers} |\n'
    for name, assess_claims in MINI_CLAIMS.items()
    for claim in assess_claims(found[name])
  )
  config = load_recipe('configs/mini.py:ViT-S,cifar10')
  steps = round(config.steps * effort.step_factor)
  return f"""# The paper's experiments in miniature

```sh
{command}
```

Models of three families and three sizes with matched compute are trained on CIFAR-10 and
Fashion-MNIST at 32x32 pixels, on all images and on parts, for {steps:,} steps of
{config.data.batch} images and for parts of that; `configs/mini.py` states the design. The purpose
is to test the paper's findings, not to match its numbers, which are shown next to ours.
{len(runs)} of {len(planned)} runs are complete: {hours:.2f} hours of training on
{', '.join(names['device']) or 'no device'}; commit {', '.join(names['commit']) or 'none'}; seeds
{' '.join(names['seed']) or 'none'}. Every number is a row of a `mini_*.csv` in this directory, with
its config, commit and seed. The same command resumes it and updates this page.

A difference is the mean over pairs of runs with the same seed, in points, ± its standard error. A
claim holds at a scale if the one-sided 95 % confidence interval of the mean (Student's t) is above
zero, and does not hold if it is below. Two things are equal if it is within a point of zero. One
seed decides nothing.

| finding of the paper | holds here | differences |
|---|---|---|
{verdicts}"""


def _format_other_pages(out: Path) -> list[str]:
  """Return a list of links to the other pages of the directory."""
  pages = {
    path.name: path.read_text(encoding='utf-8').partition('\n')[0].lstrip('# ')
    for path in sorted(out.glob('*.md'))
  }
  links = [f'- [{title}]({name})' for name, title in pages.items() if name != 'README.md']
  return ['\n'.join(['## More', '', *links, ''])] if links else []


def _format_section(name: str, records: list[dict], effort: MiniEffort) -> str:
  """Return the section of an experiment: claim, plot, our tables and the paper's table."""
  section = PAGE_SECTIONS[name]
  lines = [
    f'## {section.title}',
    '',
    f'The paper: {section.claim}',
    '',
    f'Here: {section.design}',
    '',
    *([f'![{section.title}](mini_{name}.png)', ''] if records else []),
  ]
  runs = select_mini_runs(name, effort, effort.seeds[:1])
  for measure, caption in section.measures.items():
    cells = summarize_records(
      [record for record in records if record['metric'] == measure], by_step=section.by_step
    )
    planned = (
      {}
      if section.by_step
      else {(run.row, run.column): NOT_RUN for run in runs if measure in run.measures}
    )
    if cells := planned | cells:
      lines += [f'{caption}, ours:', '', format_markdown_cells(cells), '']
  if section.read_paper_cells:
    cells = format_markdown_cells(section.read_paper_cells())
    lines += [f"The paper's {section.paper_caption}:", '', cells, '']
  return '\n'.join(lines)


def summarize_records(records: list[dict], *, by_step: bool = False) -> TableCells:
  """Return {(row, column): 'mean ± standard deviation'} in percent, at the last step.

  With `by_step`, the columns are the steps at which the runs were evaluated, as percentages of the
  run.
  """

  def cell_of(record: dict) -> tuple[str, str, str]:
    return record['row'], record['column'], record['metric']

  last, grouped = {}, {}
  for record in records:
    last[cell_of(record)] = max(last.get(cell_of(record), 0), int(record['steps']))
  for record in records:
    fraction = int(record['steps']) / last[cell_of(record)]
    if by_step or fraction == 1:
      column = f'{round(100 * fraction)} %' if by_step else record['column']
      grouped.setdefault((record['row'], column), []).append(100 * float(record['value']))
  return {key: format_mean_and_std(values) for key, values in grouped.items()}


def format_mean_and_std(values: list[float]) -> str:
  """Return '84.1 ± 0.3', or '84.1' for a single value."""
  deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
  return f'{statistics.mean(values):.1f}{deviation}'


def format_markdown_cells(cells: TableCells) -> str:
  """Return a Markdown table. Rows and columns keep the order of their first cells."""
  rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in range(2))
  lines = [['', *columns], ['---', *['---:'] * len(columns)]]
  lines += [[row, *(cells.get((row, column)) or '' for column in columns)] for row in rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def format_paper_comparison(records: list[dict], paper_cells: TableCells) -> str:
  """Return a table for each measure, with the paper's numbers in brackets."""
  parts = []
  for name in dict.fromkeys(record['metric'] for record in records):
    cells = summarize_records([record for record in records if record['metric'] == name])
    for key in cells:
      if paper_cells.get(key):
        cells[key] += f' ({paper_cells[key]})'
    parts.append(f'{name}, % (the paper in brackets)\n\n{format_markdown_cells(cells)}')
  return '\n\n'.join(parts)
