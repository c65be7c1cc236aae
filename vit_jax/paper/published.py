"""What the paper and its authors published, from tables/*.csv; tables/SOURCES.md says where each figure stands."""

import csv
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

PUBLISHED_TABLES_DIR = Path(__file__).parent / 'tables'


@functools.cache
def read_published_table(name: str) -> tuple[dict[str, str], ...]:
  """The rows of a table: `published('table6')[0]['exaFLOPs']`."""
  with (PUBLISHED_TABLES_DIR / f'{name}.csv').open(newline='', encoding='utf-8') as file:
    return tuple(csv.DictReader(file))


# How the rows of the tables that runs make are called, as tables.py calls them.
ROW_NAMES: dict[str, Callable[[dict[str, str]], str]] = {
  'table2': lambda row: row['Dataset'].replace('IIIT Pets', 'IIIT-Pets'),
  'table5': lambda row: f'{row["Pre-train"]}, {row["Transfer to"]}',
  'table6': lambda row: f'{row["Model"]}, {row["Epochs"]} epochs',
  'table7': lambda row: re.sub(r'CIFAR(?=\d)', 'CIFAR-', row['Dataset']).replace(
    'IIIT Pets', 'IIIT-Pets'
  ),
  'table8': lambda row: row['Position embedding'],
  'table9': lambda row: row['Task'],
  'selfsupervision': lambda row: row['Pre-training'],
}
_COLUMN_NAMES = {
  'Pets': 'Oxford-IIIT-Pets',
  'Flowers': 'Oxford Flowers-102',
}  # Table 6's, as other tables have them.
_FRACTION_COLUMNS = (
  'Stem only',
  'Every layer',
  'Every layer shared',
)  # Table 8's, which `read_published_cells` has in %, as all others are.


def read_published_cells(name: str) -> dict[tuple[str, str], str]:
  """{(row, column): what the paper has there} of a table in CELLS."""
  title = ROW_NAMES[name]
  shown = lambda column, cell: _format_percent(cell) if column in _FRACTION_COLUMNS else cell
  return {
    (title(row), _COLUMN_NAMES.get(column, column)): shown(column, cell)
    for row in read_published_table(name)
    for column, cell in row.items()
  }


def read_figure_13_cells() -> dict[tuple[str, str], str]:
  """{(model, 'exaFLOPs', 'img_s_core' or 'ImageNet 5-shot'): what Figure 13 has there}, the last in %."""
  rows = read_published_table('fig13')
  shots = {
    (row['model'], 'ImageNet 5-shot'): _format_percent(row['imagenet_5shot']) for row in rows
  }
  return {(row['model'], row['axis']): row['x'] for row in rows} | shots


def _format_percent(share: str) -> str:
  """'0.6579' -> '65.79', and '' of ''."""
  return share and f'{100 * float(share):.2f}'


def read_position_similarities() -> dict[str, np.ndarray]:
  """{panel: cosine similarities [h·w, h·w]} of Figures 7 (centre) and 10."""
  with np.load(PUBLISHED_TABLES_DIR / 'fig7_fig10_cosine.npz') as arrays:
    return dict(arrays)


def parse_first_number(cell: str) -> float | None:
  """The first number of a cell such as '88.55 ± 0.04', '2.5k' or '88.4/88.5*'; None where it has none."""
  found = re.match(r'\s*(-?\d+(?:\.\d+)?)(k?)', cell or '')
  return float(found[1]) * (1000 if found[2] else 1) if found else None
