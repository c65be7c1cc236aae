"""The page of an experiment: the runs of a table or a miniature, from the CSV of `tables`."""

import statistics
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.paper.reproductions import format_reproduction_title, reproduction_paper_cells
from vit_jax.paper.results_page import PAGE_SECTIONS, TableCells, summarize_records
from vit_jax.paper.runner import RECORD_COLUMNS, read_records_csv
from vit_jax.report.charts import Chart, draw_rows
from vit_jax.report.page import ComparisonTable, Report
from vit_jax.report.summary import format_seconds

MINIATURE_PREFIX = 'mini_'


def report_experiment(path: Path) -> Report:
  """Return the page of the records in a CSV that `tables` wrote.

  Raises UserError if the file is not such a CSV.
  """
  records = read_experiment(path)
  miniature = path.stem.startswith(MINIATURE_PREFIX)
  section = PAGE_SECTIONS.get(path.stem.removeprefix(MINIATURE_PREFIX)) if miniature else None
  measures = list(dict.fromkeys(record['metric'] for record in records))
  captions = section.measures if section else {}
  by_step = section.by_step if section else False
  tables = [
    _table_of_cells(
      captions.get(measure, f'{measure}, %'),
      summarize_records(
        [record for record in records if record['metric'] == measure], by_step=by_step
      ),
    )
    for measure in measures
  ]
  title, caption, cells = _published(path, section)
  if cells:
    tables.append(_table_of_cells(f'The paper: {caption}', cells))
  return Report(
    title=title,
    sentences=_describe(records, section),
    comparison=tables,
    curves=[chart for measure in measures for chart in _draw_measure(records, measure)],
  )


def read_experiment(path: Path) -> list[dict[str, str]]:
  """Return the records in a CSV of `tables`. Raises UserError if it is another file."""
  try:
    records = read_records_csv(path)
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path}: {error}') from None
  if not records or tuple(records[0]) != RECORD_COLUMNS:
    raise UserError(
      f'{path} has no records of runs; expected a CSV that `vit-jax tables` wrote, whose columns '
      f'are {", ".join(RECORD_COLUMNS)}'
    )
  return records


def _published(path: Path, section) -> tuple[str, str, TableCells]:
  """Return the title of an experiment, and the caption and cells of the paper's table if any."""
  if section:
    cells = section.read_paper_cells() if section.read_paper_cells else {}
    return section.title, section.paper_caption, cells
  try:
    title = format_reproduction_title(path.stem)
    return title, title, reproduction_paper_cells(path.stem)
  except UserError:  # A CSV under a name of the user.
    return path.stem, '', {}


def _describe(records: list[dict[str, str]], section) -> list[str]:
  """Return sentences about the claim of the paper and about the runs."""
  runs = {record['digest']: record for record in records}.values()
  seconds = 3600 * sum(float(record['hours']) for record in runs)
  distinct = lambda name: ', '.join(sorted({record[name] for record in runs}))
  sentences = [f'The paper: {section.claim}'] if section else []
  return [
    *sentences,
    f'{len(runs)} runs of seeds {distinct("seed")}, {format_seconds(seconds)} of training on '
    f'{distinct("device")}, at commit {distinct("commit") or "unknown"}. Cells of several seeds '
    'are mean ± standard deviation.',
  ]


def _table_of_cells(caption: str, cells: TableCells) -> ComparisonTable:
  """Return a table. Rows and columns keep the order of their first cells."""
  rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in range(2))
  return ComparisonTable(
    caption=caption,
    heading='',
    columns=columns,
    rows=[(row, [cells.get((row, column)) or '' for column in columns]) for row in rows],
  )


def _draw_measure(records: list[dict[str, str]], measure: str) -> list[Chart]:
  """Draw a measure over the steps: a chart for each column, and a line for each row.

  A point is the mean over the seeds. Without a row that was evaluated twice there is no chart.
  """
  columns: dict[str, dict[str, dict[int, list[float]]]] = {}
  for record in records:
    if record['metric'] == measure:
      points = columns.setdefault(record['column'], {}).setdefault(record['row'], {})
      points.setdefault(int(record['steps']), []).append(float(record['value']))
  charts = []
  for column, rows in columns.items():
    lines = {
      row: [(step, statistics.mean(values)) for step, values in sorted(points.items())]
      for row, points in rows.items()
    }
    if any(len(points) > 1 for points in lines.values()):
      charts.append(draw_rows(f'{measure}, {column}', lines))
  return charts
