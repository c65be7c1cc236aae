"""The head of a fine-tuning run: that of the pre-trained model, or a linear probe of its features.

A head of zeros, the paper's, sends the gradients of an untrained head to the backbone. A head that
fits the features first distorts them less (arXiv 2202.10054), and its accuracy is known before the
first step.
"""

import dataclasses
import time

import flax.traverse_util
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from vit_jax.config import DataConfig
from vit_jax.data.class_names import first_different_class
from vit_jax.errors import UserError
from vit_jax.evaluate.evaluator import Evaluator
from vit_jax.evaluate.linear_probe import fit_linear_probe
from vit_jax.evaluate.probes import ProbeFeatures, check_one_label, extract_probe_features
from vit_jax.metrics.writer import MetricsWriter
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.runtime.cluster import print_on_first_host
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.sharding.mesh import shard_from_host
from vit_jax.training.setup import Run

# More examples hardly change the probe, and take longer. They are evenly spaced over the split.
MAX_PROBE_EXAMPLES = 5000
INVERSE_L2S = (1e-3, 1e-2, 1e-1, 1.0)  # A coarse grid: training refines the head.


class InitialHead:
  """The head of a run: checks its classes, or fits it to the features of the first parameters."""

  def __init__(self, run: Run, watchdog: Watchdog, *, evaluate: bool = True):
    """`evaluate` measures the accuracy of a fitted head on the evaluation split."""
    self._run, self._watchdog, self._evaluate = run, watchdog, evaluate
    self._metrics: dict[str, float] = {}

  def check_classes(self, pretrained: PretrainedModel):
    """Raise UserError unless the head of `pretrained` has the classes of the data, in order."""
    pretrained.check_has_head()
    names, expected = pretrained.labels, self._run.train_source.label_names
    first = first_different_class(names, expected) if names else ''
    if first:
      raise UserError(
        f'config.init_head=keep: the classes of {pretrained.source} are not those of the data: '
        f'the first that differ are {first}; --config.init_head=new or probe starts a new head'
      )

  def fit(self, params: dict) -> tuple[dict, str]:
    """Return (the parameters with a fitted head, a line for the screen).

    Raises UserError if the labels of the training examples are of one class.
    """
    run, began = self._run, time.monotonic()
    pool = run.train_source.labelled.subsample(MAX_PROBE_EXAMPLES)
    test = run.eval_source.subsample(MAX_PROBE_EXAMPLES) if self._evaluate else None
    check_one_label(run.config.data.train, *filter(None, (pool, test)))
    print_on_first_host(f'fitting a linear probe to the features of {len(pool):,} images')
    features = extract_probe_features(self._make_evaluator(), params, pool, test)
    if len(np.unique(features.train_labels)) < 2:
      raise UserError(
        f'{run.config.data.train} {pool.split}: a linear probe needs labels of two '
        'classes or more; --config.init_head=new starts a head of zeros'
      )
    probe = fit_linear_probe(
      features.train_features,
      features.train_labels,
      classes=run.train_source.classes,
      inverse_l2s=INVERSE_L2S,
    )
    line = f'the head starts as a linear probe of {len(features.train_labels):,} images'
    if len(features.test_labels):
      accuracy, name = self._test_accuracy(features, probe), run.eval_source.split
      self._metrics = {f'{name}_linear_probe': accuracy, f'{name}_majority': majority(features)}
      line += f', with an accuracy of {accuracy:.4f} on {len(features.test_labels):,} of {name}'
    head = {'kernel': probe.kernel, 'bias': probe.bias}
    return (
      replace_head(params, broadcast_one_to_all(head)),
      f'{line} ({time.monotonic() - began:.0f} s)',
    )

  def write_metrics(self, writer: MetricsWriter):
    """Record the accuracy of the probe and of the most frequent class, if a probe was fitted."""
    if self._metrics:
      writer.write(0, self._metrics, kind='probe')

  def _test_accuracy(self, features: ProbeFeatures, probe) -> float:
    return features.accuracy_of(probe.predict(features.test_features))

  def _make_evaluator(self) -> Evaluator:
    program = self._run.program
    return Evaluator(
      model=program.model,
      param_shapes=program.param_shapes,
      mesh=program.mesh,
      data=dataclasses.replace(at_training_size(self._run.config.data), bad_images='skip'),
      on_batch=lambda examples: self._watchdog.arm_slow(),
    )


def at_training_size(data: DataConfig) -> DataConfig:
  """Return settings by which evaluation images have the size of those of training.

  The side to which they are resized before a crop changes in proportion.
  """
  side = round(data.eval_short_side * max(data.size) / max(data.eval_image_size))
  return dataclasses.replace(data, eval_size=(0, 0), eval_short_side=max(side, *data.size))


def majority(features: ProbeFeatures) -> float:
  """Return the test accuracy of always predicting the most frequent training label."""
  most_frequent = np.bincount(features.train_labels).argmax()
  return float(np.mean(features.test_labels == most_frequent))


def replace_head(params: dict, head: dict[str, np.ndarray]) -> dict:
  """Return the sharded parameters with the arrays of `head` in place of those of the head."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for name, array in head.items():
    old = flat[f'head/{name}']
    new = np.asarray(array, old.dtype).reshape(old.shape)
    flat[f'head/{name}'] = shard_from_host(new, old.sharding)
  return flax.traverse_util.unflatten_dict(flat, sep='/')
