"""Where parameters come from: a released .npz, or a run directory of ours."""

import dataclasses
import json
from pathlib import Path

from vit_jax.checkpoint import load_params, read_config, read_labels
from vit_jax.errors import UserError
from vit_jax.models.vit import vit
from vit_jax.pretrained.npz import read_npz


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Released:
  """A tree of NumPy arrays and what is known of it besides: '', {} and None where nothing is."""

  source: str
  params: dict
  preprocessing: dict = dataclasses.field(default_factory=dict)
  labels: tuple[str, ...] = ()  # In the order of the logits.
  grid: tuple[int, int] | None = None  # Patches (height, width) that the position embeddings are for.


def load(source: str) -> Released:
  """Reads a path to an .npz or to a run directory; a pattern such as 'runs/quickstart-*' means the newest that matches.

  UserError where there is neither.
  """
  path = newest(source)
  if path.is_dir():
    config = read_config(path)
    params, step = load_params(path)
    preprocessing = json.loads((path / 'preprocessing.json').read_text())
    grid = vit(config.model, 1).shape.grid(tuple(config.data.size))
    return Released(
      source=f'{path} at step {step}', params=params, preprocessing=preprocessing, labels=read_labels(path), grid=grid
    )
  if path.suffix != '.npz':
    raise UserError(f'config.init={source!r}: expected a run directory or a released .npz')
  return Released(source=str(path), params=read_npz(path))


def newest(source: str) -> Path:
  """The path, or the last changed of those that a pattern matches."""
  path = Path(source).expanduser()
  matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))), key=lambda match: match.stat().st_mtime)
  if not matches:
    first = '; python run_pretrain.py makes one' if source.startswith('runs/') else ''
    raise UserError(f'config.init={source!r}: there is no such file or directory{first}')
  return matches[-1]
