"""Plots of the miniatures, each next to the paper's own figure or table."""

import statistics
from collections.abc import Callable
from pathlib import Path

from vit_jax.models.families import build_model
from vit_jax.paper.mini import ALL, DATA_TITLES, FAMILIES, FEWSHOT_METRIC, SCALES, SMALLEST, SWEEP
from vit_jax.paper.published import read_published_table
from vit_jax.recipes import load_recipe

# Colors by the prefix of a model's name. The first that matches is used.
_FAMILY_COLORS = {'ViT': 'tab:blue', 'R+': 'tab:green', 'R': 'tab:red'}
_TITLES = {
  'accuracy': 'accuracy, %',
  FEWSHOT_METRIC: 'digits 5-shot, %',
}


def save_mini_plot(plot: Callable, records: list[dict], path: Path):
  """Save a PNG with our results in the left panels and the paper's in the last."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(13, 3.8), layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, 3)
  plot(panels, records)
  for axes in panels:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize='small')
  figure.savefig(path, dpi=100)


def _family_color(name: str) -> str:
  """Return the color of a model's family."""
  return next(
    (value for start, value in _FAMILY_COLORS.items() if name.startswith(start)), 'tab:gray'
  )


def _mean_and_std_by_key(
  records: list[dict], metric: str, key: Callable[[dict], object]
) -> dict[object, tuple[float, float]]:
  """Return {key: (mean, standard deviation)} over the seeds, in percent."""
  grouped = {}
  for record in records:
    if record['metric'] == metric:
      grouped.setdefault(key(record), []).append(100 * float(record['value']))
  deviation = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0
  return {name: (statistics.mean(values), deviation(values)) for name, values in grouped.items()}


def _plot_errorbars(axes, xs: list, pairs: list[tuple[float, float]], **style):
  """Plot pairs of mean and standard deviation with error bars."""
  means, deviations = zip(*pairs, strict=True)
  axes.errorbar(xs, means, yerr=deviations, marker='o', capsize=3, **style)


def _plot_learning_rates(panels, records: list[dict]):
  """Plot the accuracy on held-out images against the learning rate, for each family."""
  found = _mean_and_std_by_key(records, 'accuracy', lambda r: (r['row'], float(r['column'])))
  for axes, family in zip(panels, FAMILIES, strict=True):
    for row in dict.fromkeys(row for row, _ in found if row.startswith(f'{family}-')):
      rates = sorted(rate for name, rate in found if name == row)
      axes.plot(rates, [found[row, rate][0] for rate in rates], marker='o', label=row)
    axes.set(title=f'{family}: accuracy on held-out images, %', xlabel='learning rate')
    axes.set_xscale('log')


def _plot_data_size(panels, records: list[dict]):
  """Plot accuracy on both data sets against the number of training images, and Figure 4."""
  found = _mean_and_std_by_key(records, 'accuracy', lambda r: (r['row'], r['column']))
  for axes, data in zip(panels, DATA_TITLES.values(), strict=False):
    for model in dict.fromkeys(row for row, _ in found):
      shares = [share for share in SCALES if (model, f'{data}, {share}') in found]
      if shares:
        _plot_errorbars(
          axes,
          [1 / SCALES[share] for share in shares],
          [found[model, f'{data}, {share}'] for share in shares],
          label=model,
          color=_family_color(model),
          ls='--' if model == 'ViT-L' else '-',
        )
    axes.set(title=f'ours: {data}, %', xlabel='part of the training images', xscale='log')
  for model in dict.fromkeys(row['model'] for row in read_published_table('fig4')):
    rows = [row for row in read_published_table('fig4') if row['model'] == model]
    xs, ys = (
      [float(row[name]) for row in rows] for name in ('n_jft_millions', 'imagenet_5shot_pct')
    )
    panels[2].plot(
      xs,
      ys,
      marker='.',
      label=model,
      color=_family_color(model),
      ls='-' if '/16' in model or 'R152' in model else '--',
    )
  panels[2].set(title='Figure 4: ImageNet 5-shot, %', xlabel='JFT images, millions', xscale='log')


def _teraflops(record: dict) -> float:
  """Return the TFLOPs of training of a record's run, with three forward passes for a step."""
  config = load_recipe(record['config'].split()[0])
  forward = build_model(config.model, 10).shape.flops(config.data.size)
  return 3 * forward * config.data.batch * int(record['steps']) / 1e12


def _plot_scaling(panels, records: list[dict]):
  """Plot accuracy and few-shot accuracy against compute, and Table 6's average of five sets."""
  compute = {(record['row'], record['column']): _teraflops(record) for record in records}
  for axes, (metric, title) in zip(panels, _TITLES.items(), strict=False):
    found = _mean_and_std_by_key(records, metric, lambda r: (r['row'], r['column']))
    for name in dict.fromkeys(row for row, _ in found):
      keys = sorted((key for key in found if key[0] == name), key=compute.get)
      _plot_errorbars(
        axes,
        [compute[key] for key in keys],
        [found[key] for key in keys],
        label=name,
        color=_family_color(name),
        ls={'S': ':', 'M': '--', 'L': '-'}[name[-1]],
      )
    axes.set(title=f'ours: {title}', xlabel='TFLOPs of training', xscale='log')
  for label, start in {'ViT': 'ViT', 'hybrid': 'R50x1+', 'ResNet': 'ResNet'}.items():
    rows = [row for row in read_published_table('table6') if row['Model'].startswith(start)]
    pairs = sorted((float(row['exaFLOPs']), _figure_5_average(row)) for row in rows)
    panels[2].plot(
      *zip(*pairs, strict=True),
      'o',
      label=label,
      color=_family_color('R+' if '+' in start else start),
    )
  panels[2].set(
    title='Table 6: average of five, %', xlabel='exaFLOPs of pre-training', xscale='log'
  )


def _figure_5_average(row: dict[str, str]) -> float:
  """Return the average over Figure 5's five data sets."""
  return statistics.mean(
    float(row[name]) for name in ('ImageNet', 'CIFAR-10', 'CIFAR-100', 'Pets', 'Flowers')
  )


def _plot_bars(axes, pairs: dict[str, tuple[float, float]], title: str):
  """Plot bars of (mean, standard deviation). The axis starts a little below the lowest bar."""
  means, deviations = zip(*pairs.values(), strict=True)
  axes.bar(range(len(means)), means, yerr=deviations, capsize=3, color='tab:blue', alpha=0.7)
  axes.set_xticks(range(len(means)), list(pairs), rotation=30, ha='right', fontsize='small')
  room = max(max(means) - min(means), 1e-3)
  axes.set(title=title, ylim=(min(means) - room, max(means) + room / 2))


def _make_bar_plot(
  name: Callable[[dict], str], read_paper: Callable[[], dict], caption: str
) -> Callable:
  """Return a function that plots bars of both measures, and the paper's bars.

  `name` gives the bar that a record belongs to.
  """

  def plot(panels, records: list[dict]):
    _plot_bars(panels[0], _mean_and_std_by_key(records, 'accuracy', name), 'ours: accuracy, %')
    if few := _mean_and_std_by_key(records, FEWSHOT_METRIC, name):
      _plot_bars(panels[1], few, 'ours: digits 5-shot, %')
    _plot_bars(panels[2], read_paper(), caption)

  return plot


def _record_row(record: dict) -> str:
  """Return the row of a record."""
  return record['row']


def _table_7_bars() -> dict[str, tuple[float, float]]:
  """Return the averages of Table 7, without deviations."""
  average = next(row for row in read_published_table('table7') if row['Dataset'] == 'Average')
  return {name: (float(value), 0.0) for name, value in average.items() if name != 'Dataset'}


def _table_8_bars() -> dict[str, tuple[float, float]]:
  """Return Table 8 in percent, without deviations."""
  cells = {
    (row['Position embedding'], place): cell
    for row in read_published_table('table8')
    for place, cell in row.items()
  }
  return {
    _format_position_label(*key): (100 * float(cell), 0.0)
    for key, cell in cells.items()
    if cell and key[1] != 'Position embedding'
  }


def _format_position_label(kind: str, place: str) -> str:
  """Return a tick label of a position embedding."""
  return kind if place == 'Stem only' else f'{kind}, {place.lower()}'


def _plot_pooling(panels, records: list[dict]):
  """Plot both measures over the run, and Figure 9."""
  for axes, (metric, title) in zip(panels, _TITLES.items(), strict=False):
    found = _mean_and_std_by_key(records, metric, lambda r: (r['row'], int(r['steps'])))
    for row in dict.fromkeys(row for row, _ in found):
      steps = sorted(step for name, step in found if name == row)
      _plot_errorbars(axes, steps, [found[row, step] for step in steps], label=row)
    axes.set(title=f'ours: {title}', xlabel='step')
  for series in dict.fromkeys(row['series'] for row in read_published_table('fig9')):
    rows = [row for row in read_published_table('fig9') if row['series'] == series]
    panels[2].plot(
      [float(row['epoch']) for row in rows],
      [float(row['imagenet_5shot_pct']) for row in rows],
      label=series,
    )
  panels[2].set(title='Figure 9: ImageNet 5-shot, %', xlabel='epoch')


def _plot_transfer(panels, records: list[dict]):
  """Plot two of the transfers by the part of pre-training data, and Table 5's ViT-L/16."""
  found = _mean_and_std_by_key(records, 'accuracy', lambda r: (r['row'], r['column']))
  columns = dict.fromkeys(column for _, column in found)
  for axes, column in zip(panels[:2], columns, strict=False):
    for model in dict.fromkeys(row.split(' from ')[0] for row, _ in found):
      shares = [share for share in (SMALLEST, ALL) if (f'{model} from {share}', column) in found]
      if shares:
        pairs = [found[f'{model} from {share}', column] for share in shares]
        _plot_errorbars(
          axes, shares, pairs, label=model, color=_family_color(model),
          ls='--' if model == 'ViT-L' else '-',
        )  # fmt: skip
    axes.set(title=f'ours: {column}, %', xlabel='part of CIFAR-10 pre-trained on')
  for target in ('ImageNet', 'CIFAR-100', 'Oxford-IIIT-Pets'):
    rows = [row for row in read_published_table('table5') if row['Transfer to'] == target]
    panels[2].plot(
      [row['Pre-train'] for row in rows],
      [float(row['ViT-L/16']) for row in rows],
      marker='o',
      label=target,
    )
  panels[2].set(title='Table 5: ViT-L/16, %')


def _plot_resolution(panels, records: list[dict]):
  """Plot accuracy by resolution, for each model; the paper has no such plot."""
  models = dict.fromkeys(record['column'] for record in records)
  for axes, model in zip(panels, models, strict=False):
    bars = _mean_and_std_by_key(
      [r for r in records if r['column'] == model], 'accuracy', _record_row
    )
    _plot_bars(axes, bars, f'ours: {model}, %')
  panels[2].set_axis_off()


def _plot_masked_patches(panels, records: list[dict]):
  """Plot accuracy with and without masked patch prediction first, and that of §4.6."""
  for axes, column in zip(panels, dict.fromkeys(r['column'] for r in records), strict=False):
    of_column = [record for record in records if record['column'] == column]
    bars = _mean_and_std_by_key(of_column, 'accuracy', _record_row)
    _plot_bars(axes, bars, f'ours: {column}, %')
  theirs = {
    row['Pre-training'].split(':')[0].split(' on ')[0]: (float(row['ImageNet']), 0.0)
    for row in read_published_table('selfsupervision')
  }
  _plot_bars(panels[2], theirs, '§4.6: ImageNet, %, after pre-training')


MINI_PLOTS: dict[str, Callable] = {
  SWEEP: _plot_learning_rates,
  'data_size': _plot_data_size,
  'scaling': _plot_scaling,
  'resolution': _plot_resolution,
  'transfer': _plot_transfer,
  'pooling': _plot_pooling,
  'masked_patches': _plot_masked_patches,
  'positions': _make_bar_plot(
    lambda r: _format_position_label(r['row'], r['column']),
    _table_8_bars,
    'Table 8: ImageNet 5-shot, %',
  ),
  'optimizers': _make_bar_plot(
    lambda r: f'{r["row"]}, {r["column"]}', _table_7_bars, 'Table 7: average of five, %'
  ),
}
