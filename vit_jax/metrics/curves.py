"""curves.png: the losses, the accuracies and the learning rate of a run over its steps."""

from pathlib import Path

from vit_jax.metrics.records import split_records


def plot_curves(workdir: Path) -> Path:
  """Draw WORKDIR/curves.png from metrics.jsonl and return its path.

  Lines that are not records are ignored.
  """
  from matplotlib.backends.backend_agg import (
    FigureCanvasAgg,
  )  # Slow to import, and used once a run.
  from matplotlib.figure import Figure

  records, _ = split_records(workdir / 'metrics.jsonl')
  names = list(
    dict.fromkeys(name for record in records for name in record)
  )  # As they first appear.
  panels = {
    'loss': [name for name in names if name == 'loss' or name.endswith('_loss')],
    'accuracy': [name for name in names if name.endswith('_accuracy')],
    'learning rate': [name for name in names if name == 'lr'],
  }
  figure = Figure(figsize=(12, 3.5), layout='constrained')
  FigureCanvasAgg(figure)
  for axes, (title, series) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
    for name in series:
      points = [(record['step'], float(record[name])) for record in records if name in record]
      axes.plot(*zip(*points, strict=True), label=name, marker='.' if len(points) < 30 else None)
    axes.set(title=title, xlabel='step')
    axes.grid(alpha=0.3)
    if series:
      axes.legend()
  path = workdir / 'curves.png'
  figure.savefig(path, dpi=110)
  return path
