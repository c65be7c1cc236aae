"""Results as CSV: spreadsheets execute no cell of it."""

import csv
import io

import pytest

from vit_jax.cli.results import STDOUT, format_csv, write_output
from vit_jax.paper.runner import RECORD_COLUMNS, read_records_csv, write_records_csv

FORMULAS = (
  '=1+1',
  '+cmd|x',
  '-2+3+cmd',
  '@SUM(A1)',
  '=HYPERLINK("http://x","y")',
  '\t=1',
  '\r=1',
  '-a\r\n=1',
)
HARMLESS = (
  'cat',
  'a=b',
  'a,"b',
  'a\r=1',
  'a\n=1',
  '-0.5',
  '+1',
  '-1e-05',
  '-inf',
  '',
  "'=1",
  3,
  -2.5,
  None,
)


def read_cells(text: str) -> list[list[str]]:
  return list(csv.reader(io.StringIO(text, newline='')))


@pytest.mark.parametrize('name', FORMULAS)
def test_text_that_a_spreadsheet_would_execute_is_quoted(name):
  assert read_cells(format_csv([['label', 'n'], [name, 1]])) == [['label', 'n'], [f"'{name}", '1']]


def test_numbers_and_other_text_stay_as_they_are():
  expected = [['' if cell is None else str(cell) for cell in HARMLESS]]
  assert read_cells(format_csv([HARMLESS])) == expected


def test_records_of_experiments_execute_nothing(tmp_path):
  record = dict.fromkeys(RECORD_COLUMNS, '') | {'row': '=1+1', 'value': -0.5}
  write_records_csv([record], tmp_path / 'x.csv')
  (row,) = read_records_csv(tmp_path / 'x.csv')
  assert row == dict.fromkeys(RECORD_COLUMNS, '') | {'row': "'=1+1", 'value': '-0.5'}


def test_names_that_are_not_utf8_go_to_stdout_as_their_bytes(capfdbinary):
  write_output('é \udcff\n', STDOUT)
  assert capfdbinary.readouterr().out == 'é '.encode() + b'\xff\n'
