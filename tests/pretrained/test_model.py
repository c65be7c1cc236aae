"""Outputs of a pre-trained model, compared with a float64 computation in NumPy."""

import cv2
import numpy as np
import pytest

import vit_jax
from tests.pretrained.released_layout import google_file
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError

SIZE = (32, 24)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), np.uint8)


@pytest.fixture(params=[{}, {'pool': 'gap'}, {'hidden_head': True}], ids=str)
def model(request, tmp_path):
  config = ModelConfig(variant='mu/8', depth=3, heads=4, **request.param)
  google_file(tmp_path / 'model.npz', config, classes=5, size=SIZE)
  return vit_jax.load(str(tmp_path / 'model.npz'), size=SIZE, labels=tuple('abcde'))


def test_features_are_pooled_tokens_and_the_input_of_the_head(model):
  tokens, features = (
    np.asarray(model.tokens(IMAGES), np.float64),
    np.asarray(model.features(IMAGES), np.float64),
  )
  pooled = tokens.mean(axis=1) if model.config.pool == 'gap' else tokens[:, 0]
  assert tokens.shape == (3, 12 + (model.config.pool == 'token'), 32)
  if model.config.hidden_head:
    pooled = np.tanh(
      pooled @ model.params['pre_logits']['kernel'] + model.params['pre_logits']['bias']
    )
  np.testing.assert_allclose(features, pooled, rtol=0, atol=1e-5)
  logits = features @ model.params['head']['kernel'] + model.params['head']['bias']
  np.testing.assert_allclose(model.logits(IMAGES), logits, rtol=0, atol=1e-5)


def test_attention_is_the_softmax_of_queries_and_keys(model):
  weights = np.asarray(model.attention(IMAGES), np.float64)
  n = 12 + (model.config.pool == 'token')
  assert weights.shape == (3, 3, 4, n, n)
  np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=0, atol=1e-5)
  # Recompute the first block in NumPy.
  p = model.params
  x = (IMAGES.astype(np.float64) - 127.5) / 127.5
  patches = x.reshape(3, 4, 8, 3, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(3, 12, -1)
  x = patches @ p['embedding']['kernel'].reshape(-1, 32) + p['embedding']['bias']
  if 'cls' in p:
    x = np.concatenate([np.broadcast_to(p['cls'], (3, 1, 32)), x], axis=1)
  x = x + p['Transformer']['posembed_input']['pos_embedding']
  block = p['Transformer']['encoderblock']
  norm, attention = block['LayerNorm_0'], block['MultiHeadDotProductAttention_1']
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * norm['scale'][
    0
  ] + norm['bias'][0]
  q, k = (
    np.einsum('bnd,dhc->bhnc', x, attention[s]['kernel'][0]) + attention[s]['bias'][0][:, None]
    for s in ('query', 'key')
  )
  scores = np.einsum('bhnc,bhmc->bhnm', q, k) / np.sqrt(8)
  expected = np.exp(scores - scores.max(-1, keepdims=True))
  np.testing.assert_allclose(
    weights[:, 0], expected / expected.sum(-1, keepdims=True), rtol=0, atol=1e-5
  )


def test_the_batch_size_does_not_change_the_logits(model):
  all_logits = np.asarray(model.logits(np.concatenate([IMAGES] * 4)))
  for b in (1, 2, 3):
    np.testing.assert_allclose(model.logits(IMAGES[:b]), all_logits[:b], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  'images',
  [IMAGES[0], IMAGES[:, :8], IMAGES.astype(np.int32), IMAGES[..., :1]],
  ids=['one', 'small', 'int32', 'grey'],
)
def test_images_of_the_wrong_shape_or_dtype_raise(model, images):
  with pytest.raises(UserError, match=r'expected uint8 \[b, 32, 24, 3\]'):
    model.logits(images)


def test_a_model_without_a_head_has_features_but_no_logits(tmp_path):
  google_file(tmp_path / 'model.npz', ModelConfig(variant='mu/8'), classes=0, size=(16, 16))
  model = vit_jax.load(str(tmp_path / 'model.npz'))
  assert model.features(IMAGES[:, :16, :16]).shape == (3, 32)
  with pytest.raises(UserError, match='has no head'):
    model.logits(IMAGES[:, :16, :16])


def test_predictions_of_files_equal_those_of_their_pixels(model, tmp_path):
  paths = []
  for i, image in enumerate(IMAGES):
    paths.append(str(tmp_path / f'{i}.png'))
    cv2.imwrite(paths[-1], image[..., ::-1])
  logits = np.asarray(model.logits(IMAGES), np.float64)
  expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  for path, prediction, row in zip(
    paths, model.predict(paths, top=3, batch=2), expected, strict=True
  ):
    best = np.argsort(-row)[:3]
    assert (prediction.path, prediction.labels) == (path, tuple('abcde'[i] for i in best))
    np.testing.assert_allclose(prediction.probabilities, row[best], rtol=0, atol=1e-5)
