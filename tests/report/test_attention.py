"""The data of the attention explorer, against loops and against the model's own attention."""

import base64
import dataclasses
import zlib

import numpy as np
import pytest

from tests.pretrained.released_layout import google_file
from vit_jax.config import ModelConfig
from vit_jax.data.loader import eval_batches
from vit_jax.data.sources import open_source
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.pretrained.loading import load
from vit_jax.report import attention
from vit_jax.report.attention import analyze_attention, coarsen, compress_to_fit, quantize


def make_model(tmp_path, **fields):
  config = ModelConfig(variant='mu/4', **fields)
  google_file(tmp_path / 'model.npz', config, classes=10, size=(12, 20))
  return load(str(tmp_path / 'model.npz'), size=(12, 20))


def random_weights(first: int, n: int) -> np.ndarray:
  weights = np.random.default_rng(0).random((2, 3, first + n, n), np.float32)
  return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize('first', [0, 1])
def test_a_block_is_the_mean_of_its_queries_and_the_sum_of_its_keys(first):
  grid, block = (3, 5), 2
  weights = random_weights(first, 15)
  coarse = coarsen(weights, grid, first, block)
  assert coarse.shape == (2, 3, first + 6, 6)
  blocks = {}
  for patch in range(15):
    y, x = divmod(patch, 5)
    blocks.setdefault((y // 2) * 3 + x // 2, []).append(patch)
  for query, rows in blocks.items():
    for key, columns in blocks.items():
      expected = np.mean([weights[1, 2, first + q, columns].sum() for q in rows])
      assert coarse[1, 2, first + query, key] == pytest.approx(expected, rel=1e-5)
  if first:
    assert coarse[0, 0, 0, 0] == pytest.approx(weights[0, 0, 0, blocks[0]].sum(), rel=1e-5)
  np.testing.assert_allclose(coarse.sum(axis=-1), 1, rtol=1e-5)


def test_the_largest_weight_of_a_query_is_255():
  bytes_ = quantize(np.array([[0.5, 0.25, 0.0], [1e-9, 0, 0], [0, 0, 0]]))
  assert bytes_.tolist() == [[255, 128, 0], [255, 0, 0], [0, 0, 0]]


def test_weights_are_coarsened_until_two_images_fit(monkeypatch):
  weights = [random_weights(1, 64)] * 6
  assert compress_to_fit(weights, (8, 8), 1)[0] == 1
  assert len(compress_to_fit(weights, (8, 8), 1)[1]) == 6
  monkeypatch.setattr(attention, 'MAX_COMPRESSED_BYTES', 8_000)  # One image has 2·3·65·64 bytes.
  block, kept = compress_to_fit(weights, (8, 8), 1)
  assert block == 2 and 2 <= len(kept) < 6
  assert sum(map(len, kept)) <= 8_000
  assert len(zlib.decompress(kept[0])) == 2 * 3 * 17 * 16


@pytest.mark.parametrize('pool', ['token', 'gap'])
def test_the_explorer_has_the_attention_of_the_model(tmp_path, pool):
  model = make_model(tmp_path, pool=pool)
  source = open_source('builtin:digits', 'test[:2]')
  section = analyze_attention(model, source, ['one', 'two'])
  assert section.grid == (3, 5) and section.block == 1
  first = int(pool == 'token')
  shape = (model.model.shape.depth, model.model.shape.heads, first + 15, 15)
  data = zlib.decompress(base64.b64decode(section.images[1].weights))
  found = np.frombuffer(data, np.uint8).reshape(shape)
  config = eval_data_config(model, batch=2)
  batch = next(eval_batches(source, config, host=0, hosts=1, steps=model.preprocessing, exact=True))
  weights = np.asarray(model.attention(batch['image']))[1][..., : first + 15, first : first + 15]
  expected = 255 * weights / weights.max(axis=-1, keepdims=True)
  assert np.abs(found - expected).max() <= 0.51
  assert [image.caption for image in section.images] == ['one', 'two']


@pytest.mark.parametrize('params', [{'root_block': {}}, {'Transformer': {'axial': {}}}])
def test_a_model_without_attention_between_all_patches_has_no_section(tmp_path, params):
  model = dataclasses.replace(make_model(tmp_path), params=params)
  assert analyze_attention(model, open_source('builtin:digits', 'test[:2]'), []) is None
