"""results/README.md: what the miniatures gave, as tables and plots, with the paper's numbers beside ours."""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

from vit_jax.paper.findings import MINI_FINDINGS
from vit_jax.paper.mini import MINI_FEWSHOT_METRIC, MINI_TRAIN_IMAGES, MiniEffort
from vit_jax.paper.plots import MINI_PLOTS, save_mini_plot
from vit_jax.paper.published import read_published_table
from vit_jax.paper.runner import read_records_csv

TableCells = dict[tuple[str, str], str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PageSection:
  """Of one experiment: what the paper says, the tables of ours, and the paper's own."""

  title: str
  paper: str  # What the paper finds.
  measures: dict[str, str]  # Measure -> what it is called.
  theirs: Callable[[], TableCells] | None = None
  caption: str = ''  # Of the paper's table.


def _table_cells_reader(name: str, row: str, columns: list[str]) -> Callable[[], TableCells]:
  """The columns of a published table, by its column `row`."""
  return lambda: {
    (each[row], column): each[column] for each in read_published_table(name) for column in columns
  }


def _figure_4_cells() -> TableCells:
  sizes = {'9.06': '3 %', '30.2': '10 %', '90.6': '30 %', '302': 'all 302M'}
  return {
    (row['model'], sizes[row['n_jft_millions']]): row['imagenet_5shot_pct']
    for row in read_published_table('fig4')
  }


def _table_6_cells() -> TableCells:
  columns = ('exaFLOPs', 'ImageNet', 'CIFAR-10', 'CIFAR-100')
  return {
    (f'{row["Model"]}, {row["Epochs"]} epochs', name): row[name]
    for row in read_published_table('table6')
    for name in columns
  }


def _figure_9_cells() -> TableCells:
  """At the epochs nearest to quarters of the run."""
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
  sets = {'ImageNet': '1.3M images', 'ImageNet-21k': '14M', 'JFT-300M': '303M'}
  wanted = ('ImageNet', 'CIFAR-10', 'Oxford-IIIT-Pets')
  return {
    (f'{model} from {row["Pre-train"]} ({sets[row["Pre-train"]]})', row['Transfer to']): row[model]
    for model in ('ViT-B/16', 'ViT-L/16')
    for row in read_published_table('table5')
    if row['Transfer to'] in wanted
  }


_ACCURACY_AND_FEWSHOT = {
  'accuracy': 'Test accuracy on Fashion-MNIST, %',
  MINI_FEWSHOT_METRIC: 'Digits, 5-shot linear on the frozen features, %',
}
PAGE_SECTIONS = {
  'data_size': PageSection(
    title='Experiment 2: the size of what is learned from (Figures 3 and 4)',
    paper='ResNets are ahead when there is little to learn from and level off; Vision Transformers go on and overtake them.',
    measures=_ACCURACY_AND_FEWSHOT,
    theirs=_figure_4_cells,
    caption='Figure 4: ImageNet 5-shot, %, by the part of JFT-300M',
  ),
  'scaling': PageSection(
    title='Experiment 3: accuracy against compute (Table 6, Figure 5)',
    paper=(
      'Vision Transformers take 2 to 4 times less compute than ResNets for the same accuracy; hybrids are ahead of them where '
      'compute is small, and no longer where it is large.'
    ),
    measures=_ACCURACY_AND_FEWSHOT,
    theirs=_table_6_cells,
    caption='Table 6, of pre-training on JFT-300M',
  ),
  'optimizers': PageSection(
    title='ResNets with Adam and with SGD (Table 7)',
    paper='Adam is slightly ahead of SGD on average, which is why the paper pre-trains its ResNets with it.',
    measures=_ACCURACY_AND_FEWSHOT,
    theirs=_table_cells_reader('table7', 'Dataset', ['R50 Adam', 'R50 SGD', 'R152x2 Adam', 'R152x2 SGD']),
    caption='Table 7, after fine-tuning, %',
  ),
  'positions': PageSection(
    title='Position embeddings (Table 8)',
    paper='To have none costs three points; of which kind they are, and where they are added, hardly matters.',
    measures=_ACCURACY_AND_FEWSHOT,
    theirs=_table_cells_reader('table8', 'Position embedding', ['Stem only', 'Every layer', 'Every layer shared']),
    caption='Table 8: ImageNet 5-shot of ViT-B/16, a share of 1',
  ),
  'pooling': PageSection(
    title='A class token or the mean of the patches (Figure 9)',
    paper='Both work alike, but want different learning rates.',
    measures={'accuracy': 'Test accuracy on Fashion-MNIST, %, by the share of the run', MINI_FEWSHOT_METRIC: 'Digits 5-shot, %, likewise'},
    theirs=_figure_9_cells,
    caption='Figure 9: ImageNet 5-shot, %, by the share of seven epochs',
  ),
  'transfer': PageSection(
    title='Experiment 1: transfer (Tables 2, 5 and 9)',
    paper='More pre-training data transfers better, most of all to larger models; a higher resolution in fine-tuning helps.',
    measures={'accuracy': 'Test accuracy after fine-tuning, %'},
    theirs=_table_5_cells,
    caption='Table 5, at 384 px, %',
  ),
  'masked_patches': PageSection(
    title='Self-supervision by masked patches (§4.6, Appendix B.1.2)',
    paper='Two points better than from scratch, and four behind supervised pre-training.',
    measures={'accuracy': 'Test accuracy after fine-tuning on 500 labelled images, %'},
    theirs=lambda: {(row['Pre-training'], row['Model']): row['ImageNet'] for row in read_published_table('selfsupervision')},
    caption='ImageNet top-1 after fine-tuning, %, by the pre-training',
  ),
}  # fmt: skip


def write_results_page(out: Path, effort: MiniEffort) -> Path:
  """The page about all miniatures of which there are results."""
  found = {
    name: read_records_csv(path)
    for name in PAGE_SECTIONS
    if (path := out / f'mini_{name}.csv').is_file()
  }
  parts = [_format_introduction(found, effort)]
  for name, records in found.items():
    save_mini_plot(MINI_PLOTS[name], records, out / f'mini_{name}.png')
    parts.append(_format_section(name, records))
  parts += _format_other_pages(out)
  path = out / 'README.md'
  path.write_text('\n'.join(parts), encoding='utf-8')
  return path


def _format_introduction(found: dict[str, list[dict]], effort: MiniEffort) -> str:
  """What this page is, how it was made, and what came out in a few lines."""
  runs = {record['digest']: record for records in found.values() for record in records}
  hours = sum(float(record['hours']) for record in runs.values())
  devices = ', '.join(sorted({record['device'] for record in runs.values()}))
  commits = ', '.join(sorted({record['commit'] for record in runs.values()}))
  seeds = ' '.join(map(str, effort.seeds))
  command = f'python -m vit_jax tables mini --effort={effort.steps:g} --seeds={len(effort.seeds)}'
  command += f' --photos={effort.photos}' if effort.photos else ''
  verdicts = ''.join(
    f'| {text} | {verdict} | {numbers} |\n'
    for name in found
    for text, verdict, numbers in MINI_FINDINGS[name](found[name])
  )
  left = ', '.join(f'`{name}`' for name in PAGE_SECTIONS if name not in found)
  missing = f'Of these experiments there are no results here: {left}.\n' if left else ''
  return f"""# The paper's experiments in miniature

```sh
{command}
```

Models of three families, matched in compute, learn {MINI_TRAIN_IMAGES:,} images of Fashion-MNIST at 32x32 pixels, and are asked what they
know of digits (`configs/mini.py`, `vit_jax/paper/mini.py`): not to match the paper's numbers, which stand beside ours, but to
look for what it found. {len(runs)} runs, {hours:.2f} hours of training on {devices}; commit {commits}; seeds {seeds}, and
mean ± standard deviation over them where there are several. Every number is a row of a `mini_*.csv` here, with its config.
{missing}
| what the paper finds | here | numbers |
|---|---|---|
{verdicts}"""


def _format_other_pages(out: Path) -> list[str]:
  """What else there is to read in the directory."""
  pages = {
    path.name: path.read_text(encoding='utf-8').partition('\n')[0].lstrip('# ')
    for path in sorted(out.glob('*.md'))
  }
  links = [f'- [{title}]({name})' for name, title in pages.items() if name != 'README.md']
  return ['\n'.join(['## More', '', *links, ''])] if links else []


def _format_section(name: str, records: list[dict]) -> str:
  """A heading, what the paper says, our tables, the plot, the paper's table."""
  s = PAGE_SECTIONS[name]
  lines = [f'## {s.title}', '', f'The paper: {s.paper}', '', f'![{s.title}](mini_{name}.png)', '']
  for measure, caption in s.measures.items():
    cells = summarize_records(
      [record for record in records if record['metric'] == measure], by_step=name == 'pooling'
    )
    if cells:
      lines += [f'{caption}, ours:', '', format_markdown_cells(cells), '']
  if s.theirs:
    lines += [f"The paper's {s.caption}:", '', format_markdown_cells(s.theirs()), '']
  return '\n'.join(lines)


def summarize_records(records: list[dict], *, by_step: bool = False) -> TableCells:
  """{(row, column): 'mean ± deviation' in per cent}, at the last step; `by_step` has a column for each share of the run."""
  run = lambda record: (record['row'], record['column'], record['metric'])
  last, grouped = {}, {}
  for record in records:
    last[run(record)] = max(last.get(run(record), 0), int(record['steps']))
  for record in records:
    share = int(record['steps']) / last[run(record)]
    if by_step or share == 1:
      column = f'{round(100 * share)} %' if by_step else record['column']
      grouped.setdefault((record['row'], column), []).append(100 * float(record['value']))
  return {key: format_mean_and_std(values) for key, values in grouped.items()}


def format_mean_and_std(values: list[float]) -> str:
  """'84.1 ± 0.3', or '84.1' of one."""
  deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
  return f'{statistics.mean(values):.1f}{deviation}'


def format_markdown_cells(cells: TableCells) -> str:
  """A table, rows and columns in the order in which they come."""
  rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in range(2))
  lines = [['', *columns], ['---', *['---:'] * len(columns)]]
  lines += [[row, *(cells.get((row, column)) or '' for column in columns)] for row in rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def format_paper_comparison(records: list[dict], theirs: TableCells) -> str:
  """Of a table at full scale: a part for every measure, with the paper's number in brackets."""
  measures = dict.fromkeys(record['metric'] for record in records)
  beside = lambda key, value: f'{value} ({theirs[key]})' if theirs.get(key) else value
  part = lambda name: {
    key: beside(key, value)
    for key, value in summarize_records([r for r in records if r['metric'] == name]).items()
  }
  return '\n\n'.join(
    f'{name}, % (in brackets the paper)\n\n{format_markdown_cells(part(name))}' for name in measures
  )
