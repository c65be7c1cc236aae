"""The charts of the page, drawn by Bokeh: curves, calibration and attention distance."""

import dataclasses
import itertools

import numpy as np

from vit_jax.evaluate.statistics import CALIBRATION_BINS, calibration_curve

MAX_POINTS = 1000  # Of a series. A longer one is thinned evenly.
_COLORS = ('#3b82c4', '#d1690e', '#1f9e78', '#b5569c', '#8a7a00', '#7a6fd0', '#c94f4f', '#5b8a3c')
_DASHES = ('solid', 'dashed', 'dotted', 'dotdash')
_HEIGHT = 260  # Pixels.
_BASELINES = ('_linear_probe', '_majority')


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
  """A figure with its heading and a description for readers who cannot see it."""

  title: str
  figure: object
  alt: str


def choose_panels(names: list[str]) -> dict[str, list[str]]:
  """Return {title: names of metrics} for the metrics in metrics.jsonl, without empty panels."""
  panels = {
    'Loss': [name for name in names if name == 'loss' or name.endswith('_loss')],
    'Accuracy': [name for name in names if '_accuracy' in name],
    'Learning rate': ['lr'],
    'Images per second': ['images_per_second'],
    'Time that the devices waited for data': ['data_wait'],
    'Gradient norm': ['grad_norm'],
    'Skipped steps and images': ['skipped', 'not_finite', 'spikes'],
    'Probes': [name for name in names if '/' in name],
    'Fraction of peak FLOPs': ['mfu'],
    'Memory in bytes': [name for name in names if '_bytes' in name],
  }
  present = {title: [name for name in some if name in names] for title, some in panels.items()}
  return {title: some for title, some in present.items() if some}


def draw_curves(runs: dict[str, list[dict]]) -> list[Chart]:
  """Draw the metrics of runs {name: records} over their steps, a chart for each kind of metric."""
  names = list(
    dict.fromkeys(name for records in runs.values() for record in records for name in record)
  )
  return [_draw_panel(title, some, runs) for title, some in choose_panels(names).items()]


def _draw_panel(title: str, names: list[str], runs: dict[str, list[dict]]) -> Chart:
  """Draw a line for each metric of each run. One run has a color for each metric."""
  figure, spoken = _new_figure('step', title.lower()), []
  if title == 'Accuracy' or title.startswith('Time'):
    figure.yaxis.formatter = _formatter('0.[0]%')
  for (r, (run, records)), (m, metric) in itertools.product(
    enumerate(runs.items()), enumerate(names)
  ):
    points = [
      (record['step'], record[metric])
      for record in records
      if isinstance(record.get(metric), int | float)
    ]
    if not points:
      continue
    spoken.append(_describe_line(metric if len(runs) == 1 else f'{run}: {metric}', points))
    color, dash = (_COLORS[m % 8], 'solid') if len(runs) == 1 else (_COLORS[r % 8], _DASHES[m % 4])
    label = metric if len(runs) == 1 else (run if len(names) == 1 else f'{run}: {metric}')
    _add_line(figure, points, label=label, metric=metric, run=run, color=color, dash=dash)
  if title.startswith('Skipped'):
    figure.y_range.update(start=0, min_interval=1)
  _hover_tool(figure).renderers = list(figure.select(name='dots'))  # Not of the lines, too.
  _style_legend(figure, len(runs) * len(names) > 1)
  return Chart(title, figure, f'{title} over the steps. {" ".join(spoken)}')


def draw_rows(title: str, rows: dict[str, list[tuple[int, float]]]) -> Chart:
  """Draw a line for each row: {name: (step, fraction) points}."""
  figure, spoken = _new_figure('step', title), []
  figure.yaxis.formatter = _formatter('0.[0]%')
  for r, (row, points) in enumerate(rows.items()):
    spoken.append(_describe_line(row, points))
    color, dash = _COLORS[r % 8], _DASHES[r // 8 % 4]
    _add_line(figure, points, label=row, metric=title, run=row, color=color, dash=dash)
  _hover_tool(figure).renderers = list(figure.select(name='dots'))
  _style_legend(figure, len(rows) > 1)
  return Chart(title, figure, f'{title} over the steps. {" ".join(spoken)}')


def _add_line(figure, points: list[tuple[int, float]], *, label, metric, run, color, dash):
  """Add a line, with dots where there are few points, and what it shows when hovered over."""
  kept = points
  if len(points) > MAX_POINTS:
    kept = [points[int(i)] for i in np.linspace(0, len(points) - 1, MAX_POINTS)]
  steps, values = zip(*kept, strict=True)
  data = _column_source(
    step=steps, value=values, metric=[metric] * len(steps), run=[run] * len(steps)
  )
  style = {'source': data, 'color': color, 'legend_label': label}
  figure.line('step', 'value', line_width=2, line_dash=dash, **style)
  figure.scatter('step', 'value', size=6 if len(steps) < 60 else 3, name='dots', **style)


def draw_calibration(confidence: np.ndarray, correct: np.ndarray) -> Chart:
  """Draw the accuracy in bins of confidence. A calibrated model is on the diagonal."""
  examples, mean_confidence, accuracy = calibration_curve(confidence, correct)
  width = 1 / CALIBRATION_BINS
  used = examples > 0
  figure = _new_figure(
    'confidence',
    'accuracy',
    tooltips=[
      ('confidence', '@confidence{0.0%}'),
      ('accuracy', '@accuracy{0.0%}'),
      ('examples', '@examples{0,0}'),
    ],
    x_range=(0, 1),
    y_range=(0, 1),
  )
  figure.xaxis.formatter = figure.yaxis.formatter = _formatter('0%')
  data = _column_source(
    x=(np.flatnonzero(used) + 0.5) * width,
    confidence=mean_confidence[used],
    accuracy=accuracy[used],
    examples=examples[used],
  )
  figure.vbar('x', width * 0.92, 'accuracy', source=data, color=_COLORS[0], fill_alpha=0.55)
  figure.line([0, 1], [0, 1], line_dash='dashed', line_width=2, color=_COLORS[1])
  rows = zip(mean_confidence[used], accuracy[used], examples[used], strict=True)
  spoken = '; '.join(f'{c:.0%} confident: {a:.0%} correct of {n}' for c, a, n in rows)
  return Chart('Calibration', figure, f'Accuracy in bins of confidence. {spoken}.')


def draw_attention_distance(pixels: np.ndarray) -> Chart:
  """Draw mean attention distances [layers, heads], a dot for each head."""
  layers, heads = (index.ravel() + 1 for index in np.indices(pixels.shape))
  figure = _new_figure(
    'layer',
    'pixels',
    tooltips=[('layer', '@layer'), ('head', '@head'), ('distance', '@pixels{0.0} pixels')],
  )
  figure.y_range.start = 0
  figure.xaxis.ticker = _whole_numbers()
  data = _column_source(layer=layers, head=heads, pixels=pixels.ravel())
  figure.scatter('layer', 'pixels', size=8, source=data, color=_COLORS[0], fill_alpha=0.6)
  means = ', '.join(f'{value:.1f}' for value in pixels.mean(axis=1))
  alt = f'Mean attention distance of each head by layer. Means of the layers, in pixels: {means}.'
  return Chart('Attention distance', figure, alt)


def embed_charts(charts: list[Chart]) -> tuple[str, list[str]]:
  """Return (the JavaScript that draws the charts, a <div> for each chart).

  The JavaScript has no <script> tag around it.
  """
  from bokeh.embed import components

  if not charts:
    return '', []
  script, divs = components([chart.figure for chart in charts], wrap_script=False)
  return script, list(divs)


def bokeh_script() -> str:
  """Return BokehJS without its widgets."""
  from bokeh.resources import Resources

  return '\n'.join(Resources(mode='inline', components=['bokeh']).js_raw)


def _new_figure(x: str, y: str, *, tooltips: list[tuple[str, str]] | None = None, **options):
  from bokeh.models import HoverTool
  from bokeh.plotting import figure

  tooltips = tooltips or [
    ('run', '@run'),
    ('metric', '@metric'),
    ('step', '@step{0,0}'),
    ('value', '@value{0.[0000000]}'),
  ]
  chart = figure(
    height=_HEIGHT,
    sizing_mode='stretch_width',
    toolbar_location=None,
    tools='',
    x_axis_label=x,
    y_axis_label=y,
    background_fill_color=None,
    border_fill_color=None,
    outline_line_color=None,
    **options,
  )
  # Bokeh escapes the values. Its default table has colors of too little contrast.
  lines = ''.join(f'<div>{name}: <b>{value}</b></div>' for name, value in tooltips)
  chart.add_tools(
    HoverTool(tooltips=f'<div style="color: #1a1c20; background: #ffffff">{lines}</div>')
  )
  chart.grid.grid_line_alpha = 0.25
  chart.grid.grid_line_color = '#808080'
  return chart


def _style_legend(figure, visible: bool):
  for legend in figure.legend:
    legend.visible = visible
    legend.background_fill_alpha = 0
    legend.border_line_alpha = 0
    legend.label_text_font_size = '12px'
    legend.padding = 2
    figure.add_layout(legend, 'above')
    legend.orientation = 'horizontal'
    legend.ncols = 3


def _column_source(**columns):
  from bokeh.models import ColumnDataSource

  return ColumnDataSource({name: list(np.asarray(v).tolist()) for name, v in columns.items()})


def _hover_tool(figure):
  from bokeh.models import HoverTool

  return figure.select_one(HoverTool)


def _whole_numbers():
  from bokeh.models import BasicTicker

  return BasicTicker(min_interval=1)


def _formatter(text: str):
  from bokeh.models import NumeralTickFormatter

  return NumeralTickFormatter(format=text)


def _describe_line(name: str, points: list[tuple[int, float]]) -> str:
  (first, begin), (last, end) = points[0], points[-1]
  if first == last:
    return f'{name} is {end:.4g} at step {last}.'
  return f'{name} goes from {begin:.4g} at step {first} to {end:.4g} at step {last}.'
