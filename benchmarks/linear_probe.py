"""How much a pre-trained model knows: a linear classifier on its frozen features.

    python benchmarks/linear_probe.py --init S_16.npz --data folder:photos

Logistic regression (scikit-learn) on the features, standardised by the training split's mean and deviation; its strength is the
best of a sweep by the likelihood in five-fold cross-validation on the training split.
"""

import argparse
import time

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

import vit_jax
from vit_jax.config import DataConfig
from vit_jax.data.loader import eval_batches
from vit_jax.data.sources import open_source

STRENGTHS = 10.0 ** np.arange(-4, 2.5, 0.5)


def extract(model, source, batch: int) -> tuple[np.ndarray, np.ndarray]:
  """(features [n, d] in float64, the first label of each example [n])."""
  how = model.preprocessing
  data = DataConfig(eval_batch=batch, size=model.size, eval_crop=how['crop'], eval_short_side=how['short_side'])
  features, labels = [], []
  for part in eval_batches(source, data, host=0, hosts=1, exact=True):
    features.append(np.asarray(model.features(part['image']), np.float64)[part['mask']])
    labels.append(part['label'][part['mask'], 0])
  return np.concatenate(features), np.concatenate(labels)


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
  probe = GridSearchCV(LogisticRegression(max_iter=2000), {'C': STRENGTHS}, cv=5, scoring='neg_log_loss').fit(x, y)
  result, c = probe.best_estimator_.score(x_test, y_test), probe.best_params_['C']
  print(f'{args.init} on {args.data}: {100 * result:.1f} % of {len(y_test)}, a linear probe trained on {len(y)} (C {c:g})')
  print(f'{(len(y) + len(y_test)) / seconds:.1f} images/s')


if __name__ == '__main__':
  main()
