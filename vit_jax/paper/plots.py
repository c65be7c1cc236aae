"""Plots of the miniatures, each next to the paper's own figure or table."""

import statistics
from collections.abc import Callable
from pathlib import Path

from vit_jax.models.families import build_model
from vit_jax.paper.mini import MINI_DATA_FRACTIONS, MINI_FEWSHOT_METRIC, MINI_TRAIN_IMAGES
from vit_jax.paper.published import read_published_table
from vit_jax.recipes import load_recipe

# Colors by the prefix of a model's name. The first that matches is used.
_FAMILY_COLORS = {'ViT': 'tab:blue', 'R+': 'tab:green', 'R': 'tab:red'}
_TITLES = {
  'accuracy': 'Fashion-MNIST accuracy, %',
  MINI_FEWSHOT_METRIC: 'digits 5-shot, %',
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


def _plot_data_size(panels, records: list[dict]):
  """Plot accuracy and few-shot accuracy against the number of training images, and Figure 4."""
  for axes, (metric, title) in zip(panels, _TITLES.items(), strict=False):
    found = _mean_and_std_by_key(records, metric, lambda r: (r['row'], r['column']))
    for model in dict.fromkeys(row for row, _ in found):
      shares = [share for share in MINI_DATA_FRACTIONS if (model, share) in found]
      xs = [MINI_TRAIN_IMAGES // MINI_DATA_FRACTIONS[share] for share in shares]
      _plot_errorbars(
        axes,
        xs,
        [found[model, share] for share in shares],
        label=model,
        color=_family_color(model),
        ls='--' if model == 'ViT-L' else '-',
      )
    axes.set(title=f'ours: {title}', xlabel='training images', xscale='log')
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


def _forward_megaflops(record: dict) -> float:
  """Return the MFLOPs of a forward pass of a record's model at its own resolution."""
  config = load_recipe(record['config'].split()[0])
  return build_model(config.model, 10).shape.flops(config.data.size) / 1e6


def _plot_scaling(panels, records: list[dict]):
  """Plot accuracy and few-shot accuracy against compute, and Table 6's average of five sets."""
  compute = {record['row']: _forward_megaflops(record) for record in records}
  families = {'ViT': 'ViT-', 'hybrid': 'R+', 'ResNet': 'R-'}
  for axes, (metric, title) in zip(panels, _TITLES.items(), strict=False):
    found = _mean_and_std_by_key(records, metric, lambda r: r['row'])
    for label, start in families.items():
      names = sorted((name for name in found if name.startswith(start)), key=compute.get)
      if names:
        _plot_errorbars(
          axes,
          [compute[name] for name in names],
          [found[name] for name in names],
          label=label,
          color=_family_color(start),
        )
    axes.set(title=f'ours: {title}', xlabel='MFLOPs of a forward pass', xscale='log')
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
    if few := _mean_and_std_by_key(records, MINI_FEWSHOT_METRIC, name):
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
  """Plot two of the transfers by the fraction of pre-training data, and Table 5's ViT-L/16."""
  found = _mean_and_std_by_key(records, 'accuracy', lambda r: (r['row'], r['column']))
  columns = [name for name in dict.fromkeys(column for _, column in found) if '64 px' in name][:2]
  for axes, column in zip(panels, columns, strict=False):
    for model in dict.fromkeys(row.split(' from ')[0] for row, _ in found):
      shares = [
        share for share in MINI_DATA_FRACTIONS if (f'{model} from {share}', column) in found
      ]
      if shares:
        pairs = [found[f'{model} from {share}', column] for share in shares]
        _plot_errorbars(axes, shares, pairs, label=model, color=_family_color(model))
    axes.set(title=f'ours: {column}, %', xlabel='part of Fashion-MNIST pre-trained on')
  for target in ('ImageNet', 'CIFAR-100', 'Oxford-IIIT-Pets'):
    rows = [row for row in read_published_table('table5') if row['Transfer to'] == target]
    panels[2].plot(
      [row['Pre-train'] for row in rows],
      [float(row['ViT-L/16']) for row in rows],
      marker='o',
      label=target,
    )
  panels[2].set(title='Table 5: ViT-L/16, %')


def _plot_masked_patches(panels, records: list[dict]):
  """Plot accuracy with and without masked patch prediction first, and that of §4.6."""
  _plot_bars(panels[0], _mean_and_std_by_key(records, 'accuracy', _record_row), 'ours: accuracy, %')
  for seed in sorted({r['seed'] for r in records}):
    of_seed = {
      name: mean
      for name, (mean, _) in _mean_and_std_by_key(
        [r for r in records if r['seed'] == seed], 'accuracy', _record_row
      ).items()
    }
    panels[1].plot(list(of_seed), list(of_seed.values()), marker='o', label=f'seed {seed}')
  panels[1].set(title='ours, seed by seed, %')
  theirs = {
    row['Pre-training'].split(':')[0].split(' on ')[0]: (float(row['ImageNet']), 0.0)
    for row in read_published_table('selfsupervision')
  }
  _plot_bars(panels[2], theirs, '§4.6: ImageNet, %, after pre-training')


MINI_PLOTS: dict[str, Callable] = {
  'data_size': _plot_data_size,
  'scaling': _plot_scaling,
  'optimizers': _make_bar_plot(lambda r: r['column'], _table_7_bars, 'Table 7: average of five, %'),
  'positions': _make_bar_plot(
    lambda r: _format_position_label(r['row'], r['column']),
    _table_8_bars,
    'Table 8: ImageNet 5-shot, %',
  ),
  'pooling': _plot_pooling,
  'transfer': _plot_transfer,
  'masked_patches': _plot_masked_patches,
}
