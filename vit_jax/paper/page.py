"""results/README.md: what the miniatures gave, as tables and plots, with the paper's numbers beside ours."""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

from vit_jax.paper.findings import FINDINGS
from vit_jax.paper.mini import FEWSHOT, IMAGES, Effort
from vit_jax.paper.plots import PLOTS, draw
from vit_jax.paper.published import published
from vit_jax.paper.runner import read_records

Cells = dict[tuple[str, str], str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
  """Of one experiment: what the paper says, the tables of ours, and the paper's own."""

  title: str
  paper: str  # What the paper finds.
  measures: dict[str, str]  # Measure -> what it is called.
  theirs: Callable[[], Cells] | None = None
  caption: str = ''  # Of the paper's table.


def from_table(name: str, row: str, columns: list[str]) -> Callable[[], Cells]:
  """The columns of a published table, by its column `row`."""
  return lambda: {
    (each[row], column): each[column] for each in published(name) for column in columns
  }


def figure_4() -> Cells:
  sizes = {'9.06': '3 %', '30.2': '10 %', '90.6': '30 %', '302': 'all 302M'}
  return {
    (row['model'], sizes[row['n_jft_millions']]): row['imagenet_5shot_pct']
    for row in published('fig4')
  }


def table_6() -> Cells:
  columns = ('exaFLOPs', 'ImageNet', 'CIFAR-10', 'CIFAR-100')
  return {
    (f'{row["Model"]}, {row["Epochs"]} epochs', name): row[name]
    for row in published('table6')
    for name in columns
  }


def figure_9() -> Cells:
  """At the epochs nearest to quarters of the run."""
  rows, wanted = published('fig9'), {'25 %': 1.75, '50 %': 3.5, '75 %': 5.25, '100 %': 7}
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


def table_5() -> Cells:
  sets = {'ImageNet': '1.3M images', 'ImageNet-21k': '14M', 'JFT-300M': '303M'}
  wanted = ('ImageNet', 'CIFAR-10', 'Oxford-IIIT-Pets')
  return {
    (f'{model} from {row["Pre-train"]} ({sets[row["Pre-train"]]})', row['Transfer to']): row[model]
    for model in ('ViT-B/16', 'ViT-L/16')
    for row in published('table5')
    if row['Transfer to'] in wanted
  }


BOTH = {
  'accuracy': 'Test accuracy on Fashion-MNIST, %',
  FEWSHOT: 'Digits, 5-shot linear on the frozen features, %',
}
SECTIONS = {
  'data_size': Section(
    title='Experiment 2: the size of what is learned from (Figures 3 and 4)',
    paper='ResNets are ahead when there is little to learn from and level off; Vision Transformers go on and overtake them.',
    measures=BOTH,
    theirs=figure_4,
    caption='Figure 4: ImageNet 5-shot, %, by the part of JFT-300M',
  ),
  'scaling': Section(
    title='Experiment 3: accuracy against compute (Table 6, Figure 5)',
    paper=(
      'Vision Transformers take 2 to 4 times less compute than ResNets for the same accuracy; hybrids are ahead of them where '
      'compute is small, and no longer where it is large.'
    ),
    measures=BOTH,
    theirs=table_6,
    caption='Table 6, of pre-training on JFT-300M',
  ),
  'optimizers': Section(
    title='ResNets with Adam and with SGD (Table 7)',
    paper='Adam is slightly ahead of SGD on average, which is why the paper pre-trains its ResNets with it.',
    measures=BOTH,
    theirs=from_table('table7', 'Dataset', ['R50 Adam', 'R50 SGD', 'R152x2 Adam', 'R152x2 SGD']),
    caption='Table 7, after fine-tuning, %',
  ),
  'positions': Section(
    title='Position embeddings (Table 8)',
    paper='To have none costs three points; of which kind they are, and where they are added, hardly matters.',
    measures=BOTH,
    theirs=from_table('table8', 'Position embedding', ['Stem only', 'Every layer', 'Every layer shared']),
    caption='Table 8: ImageNet 5-shot of ViT-B/16, a share of 1',
  ),
  'pooling': Section(
    title='A class token or the mean of the patches (Figure 9)',
    paper='Both work alike, but want different learning rates.',
    measures={'accuracy': 'Test accuracy on Fashion-MNIST, %, by the share of the run', FEWSHOT: 'Digits 5-shot, %, likewise'},
    theirs=figure_9,
    caption='Figure 9: ImageNet 5-shot, %, by the share of seven epochs',
  ),
  'transfer': Section(
    title='Experiment 1: transfer (Tables 2, 5 and 9)',
    paper='More pre-training data transfers better, most of all to larger models; a higher resolution in fine-tuning helps.',
    measures={'accuracy': 'Test accuracy after fine-tuning, %'},
    theirs=table_5,
    caption='Table 5, at 384 px, %',
  ),
  'masked_patches': Section(
    title='Self-supervision by masked patches (§4.6, Appendix B.1.2)',
    paper='Two points better than from scratch, and four behind supervised pre-training.',
    measures={'accuracy': 'Test accuracy after fine-tuning on 500 labelled images, %'},
    theirs=lambda: {(row['Pre-training'], row['Model']): row['ImageNet'] for row in published('selfsupervision')},
    caption='ImageNet top-1 after fine-tuning, %, by the pre-training',
  ),
}  # fmt: skip


def write_page(out: Path, effort: Effort) -> Path:
  """The page about all miniatures of which there are results."""
  found = {
    name: read_records(path) for name in SECTIONS if (path := out / f'mini_{name}.csv').is_file()
  }
  parts = [introduction(found, effort)]
  for name, records in found.items():
    draw(PLOTS[name], records, out / f'mini_{name}.png')
    parts.append(section(name, records))
  parts += others(out)
  path = out / 'README.md'
  path.write_text('\n'.join(parts), encoding='utf-8')
  return path


def introduction(found: dict[str, list[dict]], effort: Effort) -> str:
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
    for text, verdict, numbers in FINDINGS[name](found[name])
  )
  left = ', '.join(f'`{name}`' for name in SECTIONS if name not in found)
  missing = f'Of these experiments there are no results here: {left}.\n' if left else ''
  return f"""# The paper's experiments in miniature

```sh
{command}
```

Models of three families, matched in compute, learn {IMAGES:,} images of Fashion-MNIST at 32x32 pixels, and are asked what they
know of digits (`configs/mini.py`, `vit_jax/paper/mini.py`): not to match the paper's numbers, which stand beside ours, but to
look for what it found. {len(runs)} runs, {hours:.2f} hours of training on {devices}; commit {commits}; seeds {seeds}, and
mean ± standard deviation over them where there are several. Every number is a row of a `mini_*.csv` here, with its config.
{missing}
| what the paper finds | here | numbers |
|---|---|---|
{verdicts}"""


def others(out: Path) -> list[str]:
  """What else there is to read in the directory."""
  pages = {
    path.name: path.read_text(encoding='utf-8').partition('\n')[0].lstrip('# ')
    for path in sorted(out.glob('*.md'))
  }
  links = [f'- [{title}]({name})' for name, title in pages.items() if name != 'README.md']
  return ['\n'.join(['## More', '', *links, ''])] if links else []


def section(name: str, records: list[dict]) -> str:
  """A heading, what the paper says, our tables, the plot, the paper's table."""
  s = SECTIONS[name]
  lines = [f'## {s.title}', '', f'The paper: {s.paper}', '', f'![{s.title}](mini_{name}.png)', '']
  for measure, caption in s.measures.items():
    cells = ours(
      [record for record in records if record['metric'] == measure], by_step=name == 'pooling'
    )
    if cells:
      lines += [f'{caption}, ours:', '', markdown(cells), '']
  if s.theirs:
    lines += [f"The paper's {s.caption}:", '', markdown(s.theirs()), '']
  return '\n'.join(lines)


def ours(records: list[dict], *, by_step: bool = False) -> Cells:
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
  return {key: spread(values) for key, values in grouped.items()}


def spread(values: list[float]) -> str:
  """'84.1 ± 0.3', or '84.1' of one."""
  deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
  return f'{statistics.mean(values):.1f}{deviation}'


def markdown(cells: Cells) -> str:
  """A table, rows and columns in the order in which they come."""
  rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in range(2))
  lines = [['', *columns], ['---', *['---:'] * len(columns)]]
  lines += [[row, *(cells.get((row, column)) or '' for column in columns)] for row in rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def side_by_side(records: list[dict], theirs: Cells) -> str:
  """Of a table at full scale: a part for every measure, with the paper's number in brackets."""
  measures = dict.fromkeys(record['metric'] for record in records)
  beside = lambda key, value: f'{value} ({theirs[key]})' if theirs.get(key) else value
  part = lambda name: {
    key: beside(key, value)
    for key, value in ours([r for r in records if r['metric'] == name]).items()
  }
  return '\n\n'.join(
    f'{name}, % (in brackets the paper)\n\n{markdown(part(name))}' for name in measures
  )
