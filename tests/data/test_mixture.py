"""Labelled and pseudo-labelled examples in one stream of batches."""

import dataclasses
import itertools

import cv2
import numpy as np
import pytest

from vit_jax.config import DataConfig
from vit_jax.data.fingerprint import fingerprint_data
from vit_jax.data.loader import train_batches
from vit_jax.data.mixture import SMOOTH_TARGETS, open_mixture
from vit_jax.data.pseudo_labels import (
  describe_pseudo_labels,
  start_pseudo_labels,
  write_best_labels,
  write_probabilities,
)
from vit_jax.data.sources import open_source, open_unlabelled
from vit_jax.errors import UserError
from vit_jax.optim.losses import LOSSES, multi_hot

LABELLED, UNLABELLED = 'train[:60]', 'train[60:200]'


@pytest.fixture
def data(tmp_path) -> DataConfig:
  """Return digits, of which 140 have pseudo-labels. Half of these are confident."""
  logits = (
    np.random.default_rng(0).normal(size=(140, 10)) * np.where(np.arange(140) % 2, 4, 0.1)[:, None]
  )
  source = open_unlabelled('builtin:digits', UNLABELLED)
  start_pseudo_labels(tmp_path / 'labels', describe_pseudo_labels(source, tuple('0123456789')))
  write_probabilities(
    tmp_path / 'labels', 0, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  )
  write_best_labels(tmp_path / 'labels', 1)
  return DataConfig(
    train='builtin:digits', split=LABELLED, batch=16, size=(8, 8), threads=1,
    unlabelled='builtin:digits', unlabelled_split=UNLABELLED, unlabelled_ratio=3,
    pseudo_labels=str(tmp_path / 'labels'), confidence_threshold=0.3, unlabelled_per_class=20,
  )  # fmt: skip


def mix(data: DataConfig, *, loss: str = 'softmax', smoothing: float = 0.0, seed: int = 0):
  return open_mixture(
    open_source(data.train, data.split), data, seed=seed, loss=loss, smoothing=smoothing
  )


def batches(source, data: DataConfig, count: int, **start) -> list[dict]:
  iterator = train_batches(source, data, **{'seed': 0, 'start': 0, 'host': 0, 'hosts': 1} | start)
  out = list(itertools.islice(iterator, count))
  iterator.close()
  return out


def test_batches_are_equal_for_any_first_step_hosts_and_workers(data):
  source = mix(data)
  expected = batches(source, data, 6)
  assert all(
    batch['label'].dtype == np.float32 and batch['label'].shape == (16, 10) for batch in expected
  )
  assert [int((batch['id'] < 60).sum()) for batch in expected] == [4] * 6
  hosts = [batches(source, data, 2, start=4, host=host, hosts=2) for host in range(2)]
  workers = batches(source, dataclasses.replace(data, workers=1), 2, start=4)
  for name in expected[0]:
    np.testing.assert_array_equal(
      np.concatenate([host[1][name] for host in hosts]), expected[5][name]
    )
    np.testing.assert_array_equal(workers[1][name], expected[5][name])


@pytest.mark.parametrize('loss', LOSSES)
def test_targets_are_smoothed_labels_or_normalized_pseudo_labels(data, loss):
  """The loss of labels smoothed on the host equals the loss that smooths them itself."""
  source = mix(data, loss=loss, smoothing=0.1)
  logits = np.random.default_rng(1).normal(size=(60, 10)).astype(np.float32)
  labels, targets = zip(
    *((open_source(data.train, data.split)[i][1], source[i][1]) for i in range(60)), strict=True
  )
  expected = LOSSES[loss](logits, multi_hot(np.array(labels), 10), smoothing=0.1)
  np.testing.assert_allclose(LOSSES[loss](logits, np.stack(targets)), expected, rtol=1e-5)
  for i in range(60, len(source)):
    example = source.unlabelled.indices[i - 60]
    p = np.load(f'{data.pseudo_labels}/00000.npy')[example].astype(np.float64)
    np.testing.assert_allclose(source[i][1], p / p.sum() if loss == 'softmax' else p, rtol=1e-6)


@pytest.mark.parametrize(
  ('loss', 'expected'),
  [('softmax', [0.47, 0.02, 0.47, 0.02, 0.02]), ('sigmoid', [0.9, 0.1, 0.9, 0.1, 0.1])],
)
def test_several_labels_share_the_probability_of_softmax_but_not_of_sigmoid(loss, expected):
  targets = SMOOTH_TARGETS[loss](np.array([1, 0, 1, 0, 0], np.float32), 0.1)
  np.testing.assert_allclose(targets, expected, rtol=1e-6)  # 0.9 / 2 + 0.1 / 5; 0.1 + 0.8.


def test_only_confident_images_are_selected(data):
  source = mix(data)
  assert len(source) == 60 + 20 * len(
    set(source.unlabelled.pseudo_labels.top_class[source.unlabelled.indices])
  )
  assert set(source.unlabelled.indices % 2) == {1}
  assert (source.classes, source.max_labels, source.label_names) == (10, 10, tuple('0123456789'))


def test_the_fingerprint_covers_the_pseudo_labels_and_the_selection(data):
  facts = lambda data, **how: fingerprint_data(
    mix(data, **how), open_source('builtin:digits', 'test')
  )
  same, other = facts(data), facts(dataclasses.replace(data, unlabelled_per_class=21))
  assert same == facts(data)
  assert {name for name in same if same[name] != other[name]} <= {
    'unlabelled.examples',
    'unlabelled.listing',
    'unlabelled.content',
  }
  assert same['unlabelled.listing'] != other['unlabelled.listing'] and same['train.examples'] == 60


def test_missing_or_unconfident_pseudo_labels_are_an_error(data):
  with pytest.raises(UserError, match=r'config.data.pseudo_labels.*selftrain'):
    mix(dataclasses.replace(data, pseudo_labels=''))
  with pytest.raises(
    UserError,
    match=r'config.data.confidence_threshold=1 .* 140 .* 0.99',
  ):
    mix(dataclasses.replace(data, confidence_threshold=1.0))


def test_a_folder_of_images_is_a_source_without_labels(tmp_path):
  for name in ('b/2.png', 'a.png', '.hidden/3.png', 'b/c/1.JPG', 'notes.txt'):
    path = tmp_path / 'photos' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.png', np.zeros((4, 4, 3), np.uint8))[1].tobytes())
  source = open_unlabelled(f'images:{tmp_path}/photos', 'train')
  assert [source[i][2].removeprefix(f'{tmp_path}/photos/') for i in range(len(source))] == [
    'a.png',
    'b/2.png',
    'b/c/1.JPG',
  ]
  assert source[0][1] == () and source.classes == 0
  part = open_unlabelled(f'images:{tmp_path}/photos', 'train').slice(1, 9)
  assert [part[i][2] for i in range(len(part))] == [source[i][2] for i in (1, 2)]
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='empty .*no images'):
    open_unlabelled(f'images:{tmp_path}/empty', 'train')


def test_images_without_labels_are_not_a_training_source(tmp_path):
  with pytest.raises(UserError, match='expected KIND:NAME'):
    open_source(f'images:{tmp_path}', 'train')
