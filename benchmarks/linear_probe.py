"""How much a pre-trained model knows: a linear classifier on its frozen features.

    python benchmarks/linear_probe.py --init S_16.npz --data folder:photos

Ridge regression from the features (float64, standardised by the training split's mean and deviation) to one-hot labels in
{-1, 1}; its strength is the best of a sweep on a tenth of the training split held out, and then all of it is used.
"""

import argparse
import time

import numpy as np

import vit_jax
from vit_jax.config import DataConfig
from vit_jax.data.loader import eval_batches
from vit_jax.data.sources import open_source

STRENGTHS = 10.0 ** np.arange(-2, 6)


def extract(model, source, batch: int) -> tuple[np.ndarray, np.ndarray]:
  """(features [n, d] in float64, the first label of each example [n])."""
  how = model.preprocessing
  data = DataConfig(eval_batch=batch, size=model.size, eval_crop=how['crop'], eval_short_side=how['short_side'])
  features, labels = [], []
  for part in eval_batches(source, data, host=0, hosts=1, exact=True):
    features.append(np.asarray(model.features(part['image']), np.float64)[part['mask']])
    labels.append(part['label'][part['mask'], 0])
  return np.concatenate(features), np.concatenate(labels)


def ridge(x: np.ndarray, y: np.ndarray, strength: float, classes: int) -> np.ndarray:
  """[n, d], [n] -> weights [d + 1, classes]; the bias, the last row, is not shrunk."""
  x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
  shrink = strength * np.eye(x.shape[1])
  shrink[-1, -1] = 0
  return np.linalg.solve(x.T @ x + shrink, x.T @ (2 * np.eye(classes)[y] - 1))


def accuracy(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
  """The share of examples whose largest score is their label's."""
  return float(np.mean(np.argmax(x @ weights[:-1] + weights[-1], axis=1) == y))


def main():
  """Prints one line."""
  top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  top.add_argument('--init', required=True)
  top.add_argument('--data', required=True)
  top.add_argument('--batch', type=int, default=50)
  top.add_argument('--gelu', choices=('tanh', 'erf'))
  top.add_argument('--crop', choices=('resize', 'center'))
  for name in ('mean', 'std'):
    top.add_argument(f'--{name}', type=lambda text: tuple(map(float, text.split(','))))
  args = top.parse_args()
  model = vit_jax.load(args.init, gelu=args.gelu, crop=args.crop, mean=args.mean, std=args.std)
  train, test = open_source(args.data, 'train'), open_source(args.data, '')
  began = time.monotonic()
  (x, y), (x_test, y_test) = extract(model, train, args.batch), extract(model, test, args.batch)
  seconds = time.monotonic() - began
  mean, std = x.mean(axis=0), x.std(axis=0) + 1e-9
  x, x_test = (x - mean) / std, (x_test - mean) / std
  held = np.arange(len(x)) % 10 == 0
  rated = {s: accuracy(ridge(x[~held], y[~held], s, train.classes), x[held], y[held]) for s in STRENGTHS}
  best = max(rated, key=rated.get)
  result = accuracy(ridge(x, y, best, train.classes), x_test, y_test)
  print(
    f'{args.init} on {args.data}: {100 * result:.1f} % of {len(y_test)}, a linear probe trained on {len(y)} (ridge {best:g})'
  )
  print(f'{(len(y) + len(y_test)) / seconds:.1f} images/s')


if __name__ == '__main__':
  main()
