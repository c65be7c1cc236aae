"""Runs and pages with hostile names."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.evaluate.classify import ClassificationResult
from vit_jax.train import train

HOSTILE_NAMES = (
  '<script>alert(1)</script>',
  '"><img src=x onerror=alert(2)>',
  "'; alert(3) '",
  '<\uff0fscript> {{ 7 * 7 }} & \N{ROCKET}',
  '\N{RIGHT-TO-LEFT OVERRIDE}\u05e9\u05dc\u05d5\u05dd',
)


def photos(root: Path, names: tuple[str, ...], *, each: int = 4, side: int = 80) -> Path:
  """Write noise photographs of classes `names` into train/ and val/, with hostile file names."""
  rng = np.random.default_rng(0)
  for split in ('train', 'val'):
    for name in names:
      folder = root / split / name
      folder.mkdir(parents=True, exist_ok=True)
      for i in range(each):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(file, 'jpeg')
        (folder / f'<b onclick=alert(4)>{i}.jpg').write_bytes(file.getvalue())
  return root


@pytest.fixture(scope='session')
def hostile_run(tmp_path_factory) -> Path:
  """Return the directory, with a hostile name, of a short run on classes with hostile names."""
  root = tmp_path_factory.mktemp('hostile')
  # A name of a folder cannot have a slash.
  names = tuple(name.replace('/', '\N{DIVISION SLASH}') for name in HOSTILE_NAMES)
  source = photos(root / 'photos', names)
  config = Config(
    data=DataConfig(train=f'folder:{source}', eval_split='val', batch=8, size=(16, 16), threads=1),
    model=ModelConfig(variant='mu/4', depth=2),
    optim=OptimConfig(lr=1e-3, warmup='0'),
    steps=4,
    log_every='1',
    eval_every='2',
  )
  workdir = root / '<script>alert(5)<\N{DIVISION SLASH}script> & run'
  train(config, workdir)
  return workdir


@pytest.fixture
def make_result():
  """Return a function (labels [n], probabilities [n, k]) -> ClassificationResult."""

  def make(labels: np.ndarray, probabilities: np.ndarray) -> ClassificationResult:
    top5 = np.argsort(-probabilities, axis=1, kind='stable')[:, :5].astype(np.int32)
    best = np.take_along_axis(probabilities, top5, axis=1)
    n = len(labels)
    return ClassificationResult(
      accuracy=float(np.mean(top5[:, 0] == labels)),
      accuracy_top5=float(np.mean((top5 == labels[:, None]).any(axis=1))),
      loss=1.0,
      examples=n,
      skipped=0,
      images_per_second=1.0,
      labels=labels.astype(np.int32)[:, None],
      predictions=top5[:, 0],
      confidence=best[:, 0],
      top5=top5,
      top5_probabilities=best,
      places=np.arange(n) + 100,
      probabilities=None,
    )

  return make
