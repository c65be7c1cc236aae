"""Published numbers of the paper, its authors and later papers, from tables/*.csv.

tables/SOURCES.md lists the source of each number.
"""

import csv
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

PUBLISHED_TABLES_DIR = Path(__file__).parent / 'tables'


@functools.cache
def read_published_table(name: str) -> tuple[dict[str, str], ...]:
  """Return the rows of a table: `read_published_table('table6')[0]['exaFLOPs']`."""
  with (PUBLISHED_TABLES_DIR / f'{name}.csv').open(newline='', encoding='utf-8') as file:
    return tuple(csv.DictReader(file))


# Names of the rows of published tables, as the runs of reproductions.py call them.
ROW_NAMES: dict[str, Callable[[dict[str, str]], str]] = {
  'table2': lambda row: _format_dataset(row['Dataset']),
  'table5': lambda row: f'{row["Pre-train"]}, {row["Transfer to"]}',
  'table6': lambda row: f'{row["Model"]}, {row["Epochs"]} epochs',
  'table7': lambda row: _format_dataset(row['Dataset']),
  'table8': lambda row: row['Position embedding'],
  'table9': lambda row: row['Task'],
  'selfsupervision': lambda row: row['Pre-training'],
  'augreg': lambda row: row['Model'],
  'plain_vit': lambda row: row['Change'],
  'sam': lambda row: f'{row["Model"]} {row["Rule"]}',
  'distill': lambda row: f'{row["Model"]} at {row["Pixels"]}',
}
# Table 6's columns, by their names in the other tables.
_COLUMN_NAMES = {'Pets': 'Oxford-IIIT-Pets', 'Flowers': 'Oxford Flowers-102'}
# Table 8's columns, which `read_published_cells` converts to percent, the unit of all other tables.
_FRACTION_COLUMNS = ('Stem only', 'Every layer', 'Every layer shared')


def _format_dataset(name: str) -> str:
  """Return the name of a data set as Table 5 writes it."""
  return re.sub(r'CIFAR(?=\d)', 'CIFAR-', name).replace('IIIT Pets', 'IIIT-Pets')


def read_published_cells(name: str) -> dict[tuple[str, str], str]:
  """Return {(row, column): cell} of a table in ROW_NAMES, as text."""
  row_name, cells = ROW_NAMES[name], {}
  for row in read_published_table(name):
    for column, cell in row.items():
      text = _format_percent(cell) if column in _FRACTION_COLUMNS else cell
      cells[row_name(row), _COLUMN_NAMES.get(column, column)] = text
  return cells


def read_figure_13_cells() -> dict[tuple[str, str], str]:
  """Return {(model, column): cell} of Figure 13.

  The columns are 'exaFLOPs', 'img_s_core' and 'ImageNet 5-shot', the last in percent.
  """
  rows = read_published_table('fig13')
  shots = {
    (row['model'], 'ImageNet 5-shot'): _format_percent(row['imagenet_5shot']) for row in rows
  }
  return {(row['model'], row['axis']): row['x'] for row in rows} | shots


def _format_percent(share: str) -> str:
  """Convert a fraction to percent: '0.6579' -> '65.79'. An empty cell stays empty."""
  return share and f'{100 * float(share):.2f}'


def read_position_similarities() -> dict[str, np.ndarray]:
  """Return {panel: cosine similarities [h·w, h·w]} of Figures 7 (centre) and 10."""
  with np.load(PUBLISHED_TABLES_DIR / 'fig7_fig10_cosine.npz') as arrays:
    return dict(arrays)


def parse_first_number(cell: str) -> float | None:
  """Return the first number of a cell such as '88.55 ± 0.04', '2.5k' or '88.4/88.5*', or None."""
  found = re.match(r'\s*(-?\d+(?:\.\d+)?)(k?)', cell or '')
  return float(found[1]) * (1000 if found[2] else 1) if found else None
