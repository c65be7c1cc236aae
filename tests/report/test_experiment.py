"""The page of an experiment has the numbers of its CSV, and refuses other files."""

import statistics
from pathlib import Path

import pytest

from vit_jax.errors import UserError
from vit_jax.paper.results_page import PAGE_SECTIONS
from vit_jax.paper.runner import write_records_csv
from vit_jax.report.experiment import report_experiment
from vit_jax.report.page import render_page

RESULTS = Path(__file__).parents[2] / 'results'


def record(row: str, column: str, steps: int, value: float, seed: int = 0) -> dict[str, str]:
  return {
    'row': row, 'column': column, 'metric': 'accuracy', 'value': value, 'steps': steps,
    'seed': seed, 'hours': 0.5, 'device': '1 x cpu', 'commit': 'abc', 'config': 'mini',
    'digest': f'{row}{column}{seed}',
  }  # fmt: skip


def test_cells_are_the_mean_and_standard_deviation_at_the_last_step(tmp_path):
  values = {0: (0.5, 0.7), 1: (0.4, 0.9), 2: (0.6, 0.8)}
  records = [
    record('small <b>', 'digits', steps, value, seed)
    for seed, pair in values.items()
    for steps, value in zip((10, 20), pair, strict=True)
  ]
  write_records_csv(records, tmp_path / 'mine.csv')
  found = report_experiment(tmp_path / 'mine.csv')
  (table,) = found.comparison
  last = [100 * pair[1] for pair in values.values()]
  assert table.columns == ['digits']
  assert table.rows == [('small <b>', [f'80.0 ± {statistics.stdev(last):.1f}'])]
  assert '3 runs of seeds 0, 1, 2, 1 h 30 min of training' in found.sentences[0]
  (chart,) = found.curves
  (dots,) = chart.figure.select(name='dots')
  assert list(dots.data_source.data['step']) == [10, 20]
  assert list(dots.data_source.data['value']) == pytest.approx([0.5, 0.8])
  assert 'small &lt;b&gt;' in render_page(found)


@pytest.mark.parametrize('path', sorted(RESULTS.glob('mini_*.csv')), ids=lambda path: path.stem)
def test_every_miniature_has_a_page_with_the_claim_and_the_numbers_of_the_paper(path):
  found = report_experiment(path)
  assert found.sentences[0].startswith('The paper: ')
  shown = any(table.caption.startswith('The paper') for table in found.comparison)
  section = PAGE_SECTIONS[path.stem.removeprefix('mini_')]
  assert shown == (section.read_paper_cells is not None)
  assert found.comparison and all(table.rows for table in found.comparison)


def test_the_columns_of_pooling_are_fractions_of_the_run_as_in_the_figure():
  table = report_experiment(RESULTS / 'mini_pooling.csv').comparison[0]
  assert table.columns == ['25 %', '50 %', '75 %', '100 %']


def test_a_run_that_is_evaluated_once_has_no_chart(tmp_path):
  write_records_csv([record('small', 'digits', 20, 0.8)], tmp_path / 'mine.csv')
  assert not report_experiment(tmp_path / 'mine.csv').curves


@pytest.mark.parametrize('content', ['', 'a,b\n1,2\n', 'row,column\n'])
def test_another_csv_is_an_error_that_names_the_columns(tmp_path, content):
  (tmp_path / 'mine.csv').write_text(content, encoding='utf-8')
  with pytest.raises(UserError, match='expected a CSV that `vit-jax tables` wrote'):
    report_experiment(tmp_path / 'mine.csv')


def test_a_missing_csv_is_an_error_that_names_it(tmp_path):
  with pytest.raises(UserError, match=r'absent\.csv'):
    report_experiment(tmp_path / 'absent.csv')
