"""The published numbers are complete and consistent with each other."""

import statistics

import numpy as np
import pytest

from vit_jax.paper.published import (
  PUBLISHED_TABLES_DIR,
  parse_first_number,
  read_position_similarities,
  read_published_table,
)

FIVE = ('ImageNet', 'CIFAR-10', 'CIFAR-100', 'Pets', 'Flowers')  # Figure 5's and Table 7's average.


def test_every_file_is_listed_with_its_source_and_can_be_read():
  listed = (PUBLISHED_TABLES_DIR / 'SOURCES.md').read_text(encoding='utf-8')
  for path in PUBLISHED_TABLES_DIR.iterdir():
    assert f'`{path.name}`' in listed or path.name == 'SOURCES.md'
    if path.suffix == '.csv':
      rows = read_published_table(path.stem)
      assert rows and all(None not in row and None not in row.values() for row in rows), path


def test_table_6_averages_to_table_7():
  rows = {(row['Model'], row['Epochs']): row for row in read_published_table('table6')}
  average = {row['Dataset']: row for row in read_published_table('table7')}['Average']
  for model, column in (('ResNet50x1', 'R50 Adam'), ('ResNet152x2', 'R152x2 Adam')):
    mean = statistics.mean(float(rows[model, '7'][name]) for name in FIVE)
    assert mean == pytest.approx(float(average[column]), abs=0.006)


def test_figure_3_is_table_5():
  cells = {
    (row['Pre-train'], model): row[model]
    for row in read_published_table('table5')
    if row['Transfer to'] == 'ImageNet'
    for model in row
  }
  for row in read_published_table('fig3'):
    if row['series'].startswith('ViT'):
      assert row['imagenet_top1'] == cells[row['pretrain'], row['series']]


def test_table_9_averages_to_its_last_row_and_to_table_2():
  *tasks, mean = read_published_table('table9')
  assert len(tasks) == 19
  vtab = {row['Dataset']: row for row in read_published_table('table2')}['VTAB (19 tasks)']
  for model in ('ViT-H/14 (JFT)', 'ViT-L/16 (JFT)', 'ViT-L/16 (I21k)'):
    average = statistics.mean(float(row[model]) for row in tasks)
    assert average == pytest.approx(float(mean[model]), abs=0.06)
    assert average == pytest.approx(parse_first_number(vtab[model]), abs=0.06)


def test_similarities_are_those_of_vectors_with_themselves():
  for panel, matrix in read_position_similarities().items():
    side = 7 if 'fig7' in panel else 14
    assert matrix.shape == (side**2, side**2)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(np.diag(matrix), 1)


def test_cells_are_numbers():
  assert [
    parse_first_number(cell) for cell in ('88.55 ± 0.04', '2.5k', '88.4/88.5*', '-', 'n/a', '')
  ] == [
    88.55,
    2500,
    88.4,
    None,
    None,
    None,
  ]
