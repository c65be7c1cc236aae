"""Masked patch prediction against NumPy: what is drawn, what becomes of the embeddings, and what is to be told."""

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
  """[b, H, W, c] -> [b, n, high, wide, c], the patches in raster order."""
  _, rows, columns, _ = images.shape
  places = [(y, x) for y in range(0, rows, high) for x in range(0, columns, wide)]
  return np.stack([images[:, y : y + high, x : x + wide] for y, x in places], axis=1)


@pytest.mark.parametrize('cells', [1, 4])
def test_a_target_is_the_mean_colour_in_three_bits_a_channel(cells):
  rng = np.random.default_rng(0)
  shades = [np.full((1, 16, 24, 3), level) for level in (0, 31, 32, 223, 224, 255)]
  images = np.concatenate(
    [rng.integers(0, 256, (20, 16, 24, 3)), rng.integers(90, 110, (20, 16, 24, 3)), *shades]
  )
  patches = cut(images.astype(np.uint8), 8, 12).reshape(len(images), -1, 8, 12, 3)
  parts = np.stack(
    [cut(patches[:, i], 8 // cells, 12 // cells) for i in range(patches.shape[1])], axis=1
  )
  red, green, blue = np.floor(parts.astype(np.float64).mean(axis=(3, 4)) / 256 * 8).transpose(
    3, 0, 1, 2
  )
  found = color_targets(images.astype(np.uint8), (8, 12), cells)
  np.testing.assert_array_equal(found, red * 64 + green * 8 + blue)
  assert found.shape == (len(images), 4, cells**2) and (found.min(), found.max()) == (0, 511)


def test_pixels_are_told_as_the_model_sees_them():
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 3), dtype=np.uint8)
  expected = (cut(images, 4, 8).reshape(3, 4, -1) - 127.5) / 127.5
  np.testing.assert_allclose(
    pixel_targets(images, (4, 8), ModelConfig(dtype='bfloat16')), expected, atol=1e-6
  )


@pytest.mark.parametrize(
  'key', [jax.random.key(1), fold_in_device(jax.random.key_data(jax.random.key(1)), jnp.uint32(3))]
)
def test_of_the_corrupted_patches_80_percent_are_masked_and_10_are_another(key):
  drawn = jax.tree.map(
    np.asarray, jax.jit(sample_corruption, static_argnums=(1, 2, 3))(key, B, N, M)
  )
  assert all(len(set(row)) == M for row in drawn.places)  # Each once, exactly so many.
  chosen = np.zeros((B, N), bool)
  np.put_along_axis(chosen, drawn.places, True, axis=1)
  swapped = drawn.source != np.arange(N)
  assert not (swapped & drawn.masked).any() and not ((swapped | drawn.masked) & ~chosen).any()
  within = lambda count, of, share: abs(count - of * share) < 5 * np.sqrt(of * share * (1 - share))
  assert within(drawn.masked.sum(), B * M, 0.8) and within(swapped.sum(), B * M, 0.1)
  assert all(within(count, B, M / N) for count in chosen.sum(axis=0))  # Every place as often.
  steps = np.bincount(((drawn.source - np.arange(N)) % N)[swapped], minlength=N)
  assert steps[0] == 0 and all(
    within(count, steps.sum(), 1 / (N - 1)) for count in steps[1:]
  )  # So is every other.


def test_embeddings_become_the_mask_another_or_stay():
  rng = np.random.default_rng(0)
  x, mask = (
    rng.normal(size=(5, N, 3)).astype(np.float32),
    rng.normal(size=(1, 1, 3)).astype(np.float32),
  )
  drawn = jax.tree.map(np.asarray, sample_corruption(jax.random.key(0), 5, N, M))
  found = np.asarray(corrupt_embeddings(x, mask, drawn))
  for b, n in np.ndindex(5, N):
    np.testing.assert_array_equal(
      found[b, n], mask[0, 0] if drawn.masked[b, n] else x[b, drawn.source[b, n]]
    )


def test_in_evaluation_an_image_has_its_own_draw_in_every_batch():
  images, fixed = (
    np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8),
    jax.jit(sample_eval_corruption, static_argnums=(1, 2)),
  )
  order = np.array([4, 1, 5])
  drawn, other = jax.device_get((fixed(images, N, M), fixed(images[order], N, M)))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), drawn, other)
  assert len({tuple(places) for places in drawn.places}) == 6


def loaded(config: Config, seed: int = 0):
  """(the model, parameters of normal numbers)."""
  rng, model = np.random.default_rng(seed), build_masked_vit(config)
  shapes = abstract_params(model, config.data.size)
  return model, jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
  ('target', 'said', 'actual'),
  [('colour', (4, 1, 512), (4, 1)), ('grid', (4, 16, 512), (4, 16)), ('pixels', (4, 48), (4, 48))],
)
def test_half_of_the_patches_are_told(target, said, actual):
  model, params = loaded(dataclasses.replace(CONFIG, mask=MaskConfig(target=target)))
  images = jax.ShapeDtypeStruct((3, 8, 16, 3), jnp.uint8)
  out = jax.eval_shape(lambda images: model.apply({'params': params}, images), images)
  assert [leaf.shape for leaf in out] == [(3, *said), (3, *actual)]


def test_a_masked_patch_is_told_without_its_pixels_and_the_mask_learns():
  """Its pixels in another order, of the same sum and so the same draw, change no logit; the mask has a gradient."""
  model, params = loaded(CONFIG)
  images = np.random.default_rng(0).integers(0, 255, (1, 8, 16, 3), dtype=np.uint8)
  drawn = jax.device_get(sample_eval_corruption(images, 8, 4))
  place = next(n for n in range(8) if drawn.masked[0, n] and n not in np.delete(drawn.source[0], n))
  y, x = 4 * (place // 4), 4 * (place % 4)
  other = images.copy()
  other[0, y : y + 4, x : x + 4] = images[0, y : y + 4, x : x + 4][::-1]

  def loss(params, images):
    logits, actual = model.apply({'params': params}, images)
    return -jnp.take_along_axis(
      jax.nn.log_softmax(logits), actual[..., None], axis=-1
    ).mean(), logits

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  (grads, logits), (_, again) = gradient(params, images), gradient(params, other)
  np.testing.assert_array_equal(logits, again)
  assert not np.array_equal(images, other)
  assert all(
    np.abs(leaf).max() > 0
    for leaf in (grads['mask'], grads['patch_head']['kernel'], grads['embedding']['kernel'])
  )


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'model': ModelConfig(variant='R50x1')}, 'R50x1 is a BiT ResNet'),
    ({'model': ModelConfig(variant='R50+B/16')}, 'R50\\+B/16 is a hybrid'),
    ({'model': ModelConfig(variant='mu/4', pool='map')}, 'would not train it; use token or gap'),
    (
      {'model': ModelConfig(variant='mu/2'), 'mask': MaskConfig(target='grid')},
      'a patch of 2x2 does not divide into 4x4',
    ),
    ({'mask': MaskConfig(target='colour', rate=0.01)}, 'corrupts 0 of 8 patches'),
    ({'data': DataConfig(size=(4, 4))}, 'of 1 patches'),
  ],
)
def test_what_does_not_go_together_is_an_error(changes, words):
  with pytest.raises(UserError, match=words):
    build_masked_vit(dataclasses.replace(CONFIG, **changes))
