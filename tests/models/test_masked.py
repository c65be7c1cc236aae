"""Tests of masked patch prediction against NumPy: corruption, embeddings and targets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.config import Config, DataConfig, MaskConfig, ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.masked import (
  build_masked_vit,
  color_targets,
  corrupt_embeddings,
  pixel_targets,
  sample_corruption,
  sample_eval_corruption,
)
from vit_jax.sharding.prng import fold_in_device
from vit_jax.step import abstract_params

B, N, M = 4000, 20, 10
CONFIG = Config(
  data=DataConfig(size=(8, 16)),
  model=ModelConfig(variant='mu/4', registers=2),
  mask=MaskConfig(target='colour'),
  steps=1,
)


def cut(images: np.ndarray, high: int, wide: int) -> np.ndarray:
  """Cut [b, H, W, c] into patches [b, n, high, wide, c] in raster order."""
  _, rows, columns, _ = images.shape
  corners = [(y, x) for y in range(0, rows, high) for x in range(0, columns, wide)]
  return np.stack([images[:, y : y + high, x : x + wide] for y, x in corners], axis=1)


@pytest.mark.parametrize('cells', [1, 4])
def test_color_targets_are_mean_colors_with_three_bits_per_channel(cells):
  rng = np.random.default_rng(0)
  shades = [np.full((1, 16, 24, 3), level) for level in (0, 31, 32, 223, 224, 255)]
  images = np.concatenate(
    [rng.integers(0, 256, (20, 16, 24, 3)), rng.integers(90, 110, (20, 16, 24, 3)), *shades]
  )
  patches = cut(images.astype(np.uint8), 8, 12).reshape(len(images), -1, 8, 12, 3)
  parts = [cut(patches[:, i], 8 // cells, 12 // cells) for i in range(patches.shape[1])]
  means = np.stack(parts, axis=1).astype(np.float64).mean(axis=(3, 4))
  red, green, blue = np.floor(means / 256 * 8).transpose(3, 0, 1, 2)
  targets = color_targets(images.astype(np.uint8), (8, 12), cells)
  np.testing.assert_array_equal(targets, red * 64 + green * 8 + blue)
  assert targets.shape == (len(images), 4, cells**2)
  assert (targets.min(), targets.max()) == (0, 511)


def test_pixel_targets_are_normalized_in_float32():
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 3), dtype=np.uint8)
  expected = (cut(images, 4, 8).reshape(3, 4, -1) - 127.5) / 127.5
  targets = pixel_targets(images, (4, 8), ModelConfig(dtype='bfloat16'))
  np.testing.assert_allclose(targets, expected, atol=1e-6)


@pytest.mark.parametrize(
  'key', [jax.random.key(1), fold_in_device(jax.random.key_data(jax.random.key(1)), jnp.uint32(3))]
)
def test_80_percent_of_corrupted_patches_are_masked_and_10_percent_swapped(key):
  sample = jax.jit(sample_corruption, static_argnums=(1, 2, 3))
  corruption = jax.tree.map(np.asarray, sample(key, B, N, M))
  assert all(len(set(row)) == M for row in corruption.indices)
  chosen = np.zeros((B, N), bool)
  np.put_along_axis(chosen, corruption.indices, True, axis=1)
  masked, swapped = corruption.is_masked, corruption.source_indices != np.arange(N)
  assert not (swapped & masked).any() and not ((swapped | masked) & ~chosen).any()
  # Counts agree with their fractions within five standard deviations.
  within = lambda count, of, share: abs(count - of * share) < 5 * np.sqrt(of * share * (1 - share))
  assert within(masked.sum(), B * M, 0.8) and within(swapped.sum(), B * M, 0.1)
  assert all(within(count, B, M / N) for count in chosen.sum(axis=0))  # Every patch equally often.
  # Every other patch is equally often the source.
  steps = ((corruption.source_indices - np.arange(N)) % N)[swapped]
  counts = np.bincount(steps, minlength=N)
  assert counts[0] == 0 and all(within(count, counts.sum(), 1 / (N - 1)) for count in counts[1:])


def test_corrupted_embeddings_are_the_mask_another_patchs_or_their_own():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(5, N, 3)).astype(np.float32)
  mask = rng.normal(size=(1, 1, 3)).astype(np.float32)
  corruption = jax.tree.map(np.asarray, sample_corruption(jax.random.key(0), 5, N, M))
  out = np.asarray(corrupt_embeddings(x, mask, corruption))
  for b, n in np.ndindex(5, N):
    source = x[b, corruption.source_indices[b, n]]
    np.testing.assert_array_equal(out[b, n], mask[0, 0] if corruption.is_masked[b, n] else source)


def test_the_corruption_of_an_image_in_evaluation_does_not_depend_on_its_batch():
  images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
  sample = jax.jit(sample_eval_corruption, static_argnums=(1, 2))
  order = np.array([4, 1, 5])
  one, other = jax.device_get((sample(images, N, M), sample(images[order], N, M)))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), one, other)
  assert len({tuple(indices) for indices in one.indices}) == 6


def model_and_params(config: Config, seed: int = 0):
  """Build the model and draw its parameters from a normal distribution."""
  rng, model = np.random.default_rng(seed), build_masked_vit(config)
  shapes = abstract_params(model, config.data.size)
  return model, jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
  ('target', 'prediction_shape', 'target_shape'),
  [('colour', (4, 1, 512), (4, 1)), ('grid', (4, 16, 512), (4, 16)), ('pixels', (4, 48), (4, 48))],
)
def test_the_model_predicts_half_of_the_patches(target, prediction_shape, target_shape):
  model, params = model_and_params(dataclasses.replace(CONFIG, mask=MaskConfig(target=target)))
  images = jax.ShapeDtypeStruct((3, 8, 16, 3), jnp.uint8)
  out = jax.eval_shape(lambda images: model.apply({'params': params}, images), images)
  assert [leaf.shape for leaf in out] == [(3, *prediction_shape), (3, *target_shape)]


def test_logits_do_not_depend_on_masked_pixels_and_the_mask_has_a_gradient():
  """Reordering the pixels of a masked patch keeps their sum, and so the corruption of the image."""
  model, params = model_and_params(CONFIG)
  images = np.random.default_rng(0).integers(0, 255, (1, 8, 16, 3), dtype=np.uint8)
  corruption = jax.device_get(sample_eval_corruption(images, 8, 4))
  source = corruption.source_indices[0]
  unread = lambda n: corruption.is_masked[0, n] and n not in np.delete(source, n)
  patch = next(n for n in range(8) if unread(n))
  y, x = 4 * (patch // 4), 4 * (patch % 4)
  other = images.copy()
  other[0, y : y + 4, x : x + 4] = images[0, y : y + 4, x : x + 4][::-1]

  def loss(params, images):
    logits, targets = model.apply({'params': params}, images)
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1).mean(), logits

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  (grads, logits), (_, other_logits) = gradient(params, images), gradient(params, other)
  np.testing.assert_array_equal(logits, other_logits)
  assert not np.array_equal(images, other)
  for leaf in (grads['mask'], grads['patch_head']['kernel'], grads['embedding']['kernel']):
    assert np.abs(leaf).max() > 0


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'model': ModelConfig(variant='R50x1')}, 'R50x1 is a BiT ResNet'),
    ({'model': ModelConfig(variant='R50+B/16')}, r'R50\+B/16 is a hybrid'),
    ({'model': ModelConfig(variant='mu/4', pool='map')}, "config.model.pool='map'"),
    (
      {'model': ModelConfig(variant='mu/2'), 'mask': MaskConfig(target='grid')},
      "config.mask.target='grid'.* 2x2 .* 4x4",
    ),
    ({'mask': MaskConfig(target='colour', rate=0.01)}, 'config.mask.rate=0.01 corrupts 0 of 8'),
    ({'data': DataConfig(size=(4, 4))}, 'config.mask.rate=.* of 1 patches'),
  ],
)
def test_models_that_cannot_be_trained_by_masking_are_errors(changes, named):
  with pytest.raises(UserError, match=named):
    build_masked_vit(dataclasses.replace(CONFIG, **changes))


def test_each_prediction_is_read_from_the_token_of_its_own_patch():
  """With zero branches, a token is the norm of its embedding, so NumPy can predict every patch."""
  config = dataclasses.replace(
    CONFIG,
    model=ModelConfig(variant='mu/4', position='none', depth=1),
    mask=MaskConfig(target='pixels'),
  )
  model, params = model_and_params(config)
  block = params['Transformer']['encoderblock']
  for linear in (block['MultiHeadDotProductAttention_1']['out'], block['MlpBlock_3']['Dense_1']):
    linear |= jax.tree.map(np.zeros_like, dict(linear))
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3), dtype=np.uint8)
  predictions, targets = jax.jit(model.apply)({'params': params}, images)
  corruption = jax.device_get(sample_eval_corruption(images, 8, 4))
  pixels = (cut(images, 4, 4).reshape(2, 8, -1) - 127.5) / 127.5
  embedded = pixels @ params['embedding']['kernel'].reshape(48, -1) + params['embedding']['bias']
  norm, head = params['Transformer']['encoder_norm'], params['patch_head']
  for b, i in np.ndindex(2, 4):
    patch = corruption.indices[b, i]
    x = embedded[b, corruption.source_indices[b, patch]]
    x = params['mask'][0, 0] if corruption.is_masked[b, patch] else x
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * norm['scale'] + norm['bias']
    expected = x @ head['kernel'] + head['bias']
    np.testing.assert_allclose(predictions[b, i], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(targets[b, i], pixels[b, patch], rtol=0, atol=1e-6)
