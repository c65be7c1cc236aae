"""Render the page from its sections.

Jinja2 escapes all texts. A Content-Security-Policy lets the browser run only the page's own
scripts, by a nonce, and load nothing.
"""

import dataclasses
import math
import secrets
from pathlib import Path

from vit_jax.report.attention import AttentionSection
from vit_jax.report.charts import Chart, bokeh_script, embed_charts
from vit_jax.report.classes import Predictions
from vit_jax.runtime.files import write_atomically

_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonTable:
  """A table that compares runs."""

  caption: str
  heading: str  # Of the column of names.
  columns: list[str]
  rows: list[tuple[str, list[str]]]  # (name, a value for each column)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
  """The sections of a page. A section that is empty or None does not appear."""

  title: str
  sentences: list[str]
  numbers: list[tuple[str, str]] = ()  # (name, value), the most important first.
  command: list[str] = ()  # Its words, quoted for a shell.
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  warnings: list[str] = ()
  notes: list[str] = ()  # Which sections are missing and why.
  comparison: list[ComparisonTable] = ()
  curves: list[Chart] = ()
  predictions: Predictions | None = None
  split: str = ''
  calibration: Chart | None = None
  pictures: dict[int, str] = dataclasses.field(default_factory=dict)  # Place -> data URI.
  file_names: dict[int, str] = dataclasses.field(default_factory=dict)  # Place -> name.
  batch: list[tuple[str, str]] = ()  # (data URI, label) of augmented training images.
  attention: AttentionSection | None = None
  distance: Chart | None = None


def render_page(report: Report) -> str:
  """Return the HTML of a report."""
  import jinja2

  charts = [*report.curves, *filter(None, (report.calibration, report.distance))]
  script, divs = embed_charts(charts)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {'percent': _format_percent, 'ratio': _format_ratio}
  return environment.get_template('report.html.jinja').render(
    report=report,
    css=(_FOLDER / 'report.css').read_text(encoding='utf-8'),
    js=(_FOLDER / 'report.js').read_text(encoding='utf-8'),
    bokeh=bokeh_script() if charts else '',
    charts_script=script,
    divs={id(chart): div for chart, div in zip(charts, divs, strict=True)},
    id=id,
    images=[dataclasses.asdict(image) for image in report.attention.images]
    if report.attention
    else [],
    nonce=secrets.token_urlsafe(16),
  )


def write_page(report: Report, path: Path):
  """Write the page of a report. Parts of names that are not valid Unicode become '?'."""
  write_atomically(path, render_page(report).encode('utf-8', 'replace'))


def _format_percent(value: float) -> str:
  """Return '12.3%', or a dash for NaN."""
  return '-' if math.isnan(value) else f'{value:.1%}'


def _format_ratio(value: float | int) -> str:
  """Return a count as '1,234', and a ratio in percent."""
  return f'{value:,}' if isinstance(value, int) else _format_percent(value)
