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
from vit_jax.recipes import import_recipe

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


def test_augregs_jft_column_is_the_first_papers_table_5():
  later = {row['Model']: row['JFT-300M at 384'] for row in read_published_table('augreg')}
  jft = [
    row
    for row in read_published_table('table5')
    if (row['Pre-train'], row['Transfer to']) == ('JFT-300M', 'ImageNet')
  ]
  assert len(jft) == 1
  assert {model: jft[0][f'ViT-{model}'] for model in ('L/16', 'B/16', 'B/32')} == {
    model: number for model, number in later.items() if number != '-'
  }


def test_augregs_numbers_at_384_pixels_are_those_of_the_recommended_checkpoints():
  """README of google-research/vision_transformer."""
  readme = {
    'L/16': '85.59', 'B/16': '85.49', 'S/16': '83.73', 'R50+L/32': '85.99', 'R26+S/32': '83.85',
    'Ti/16': '78.22', 'B/32': '83.59', 'S/32': '79.58', 'R+Ti/16': '75.40',
  }  # fmt: skip
  assert {row['Model']: row['i21k-300 at 384'] for row in read_published_table('augreg')} == readme


def test_the_rows_of_the_plain_vit_are_the_changes_of_its_recipe():
  changes = import_recipe('plain_vit').CHANGES
  assert {row['Change'] for row in read_published_table('plain_vit')} == {
    change or 'none' for change in changes
  }


def test_sams_and_gsams_gains_are_those_of_their_abstracts():
  """arXiv 2106.01548: +5.3 for B/16. arXiv 2203.08065: B/32 +3.2 over SAM and +5.4 over AdamW."""
  top1 = {
    (row['Model'], row['Rule']): float(row['ImageNet']) for row in read_published_table('sam')
  }
  gains = (
    top1['B/16', 'sam'] - top1['B/16', 'adamw'],
    top1['B/32', 'gsam'] - top1['B/32', 'sam'],
    top1['B/32', 'gsam'] - top1['B/32', 'adamw'],
  )
  assert gains == pytest.approx((5.3, 3.2, 5.4))


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
