"""Cropping, resizing and augmenting single images."""

import functools
import operator

import cv2
import numpy as np
import pytest

from tests.data.photo import file, photo
from vit_jax.data.augment import RANDAUGMENT_TABLES, Augmentation
from vit_jax.data.images import (
  random_crop,
  sample_crop_box,
  sample_resized_crop_box,
  write_eval_image,
  write_train_image,
)
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.data.randaugment import rand_augment
from vit_jax.data.resize import resize_image
from vit_jax.data.sampler import random_bits

AREA, ASPECT, PIXELS = (0.05, 1.0), (3 / 4, 4 / 3), 10**8


TRAIN = {
  'name': 'a.jpg', 'key': (0, 0, 0), 'crop': 'inception', 'area': AREA, 'aspect': ASPECT, 'side': 0,
  'flip': True, 'decoding': {'max_pixels': PIXELS},
}  # fmt: skip  # fmt: skip


def train(data, size=(32, 32), **kwargs) -> np.ndarray:
  out = np.empty((*size, 3), np.uint8)
  write_train_image(data, out, **TRAIN | kwargs)
  return out


def evaluate(data, size=(32, 32), dtype=np.uint8, **kwargs) -> np.ndarray:
  out = np.empty((*size, 3), dtype)
  center = {'resize_size': (48, 48)} if kwargs.get('crop') == 'center' else {}
  steps = Preprocessing(size=size, **center | kwargs)
  write_eval_image(data, out, name='a.jpg', steps=steps, user_file=False, max_pixels=PIXELS)
  return out


JPEG = file(photo(), 'JPEG', quality=92)


def test_a_training_image_depends_only_on_its_key():
  keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
  assert all(np.array_equal(train(JPEG, key=key), train(JPEG, key=key)) for key in keys)
  assert len({train(JPEG, key=key).tobytes() for key in keys}) == 4


def test_half_of_the_imagesare_flipped():
  image = photo()
  images = [train(image, (83, 117), crop='resize', key=(7, 0, i)) for i in range(1000)]
  flips, same = (
    sum(np.array_equal(d, expected) for d in images) for expected in (image[:, ::-1], image)
  )
  assert flips + same == 1000
  assert abs(flips - 500) < 64  # Four standard deviations.


def test_the_size_may_be_rectangular():
  assert np.array_equal(
    train(photo(), (20, 50), crop='resize', flip=False), cv2.resize(photo(), (50, 20))
  )
  assert np.array_equal(evaluate(photo(), (20, 50)), cv2.resize(photo(), (50, 20)))


def test_center_crop_resizes_the_short_side_and_crops_the_center():
  image = photo(100, 200)
  small = resize_image(image, (48, 96))
  assert np.array_equal(evaluate(image, (32, 40), crop='center'), small[8:40, 28:68])
  tall = image.transpose(1, 0, 2)
  assert np.array_equal(
    evaluate(tall, (32, 40), crop='center'), resize_image(tall, (96, 48))[32:64, 4:44]
  )


def test_center_crop_rounds_the_long_side_to_the_nearest_pixel():
  image = photo(100, 133)  # 133 * 48 / 100 = 63.84.
  resized = cv2.resize(image, (64, 48), interpolation=cv2.INTER_LINEAR)
  assert np.array_equal(evaluate(image, (32, 40), crop='center'), resized[8:40, 12:52])


def test_randaugment_uses_random_bits_that_the_crop_does_not():
  key = (3, 1, 4)
  expected = rand_augment(train(JPEG, key=key), random_bits(key, 100), count=2, magnitude=9)
  assert np.array_equal(
    train(JPEG, key=key, augment=Augmentation(randaug_ops=2, randaug_magnitude=9.0)), expected
  )


def test_each_operation_draws_what_it_draws_without_the_others():
  key, image = (3, 1, 4), train(JPEG, key=(3, 1, 4))
  settings = [
    {'randaug_ops': 2, 'randaug_magnitude': 9.0},
    {'three_augment': True},
    {'color_jitter': 0.3},
    {'random_erasing': 1.0},
  ]
  one_by_one = image
  for each in settings:
    one_by_one = Augmentation(**each)(one_by_one, key)
  together = Augmentation(**functools.reduce(operator.or_, settings))
  np.testing.assert_array_equal(train(JPEG, key=key, augment=together), one_by_one)


@pytest.mark.parametrize('variant', [*RANDAUGMENT_TABLES, 'timm'])
def test_every_variant_of_randaugment_changes_an_image_at_magnitude_0(variant):
  """Two operations of `randaug(2, 0)` are not without effect."""
  apply = Augmentation(randaug_ops=2, randaug_variant=variant, interpolation='pil_random')
  changed = [not np.array_equal(apply(photo(), (0, 0, i)), photo()) for i in range(40)]
  assert sum(changed) > 5


def test_timm_fills_with_the_mean_of_the_model():
  """Translations show it: the mean is rounded as timm rounds it."""
  apply = Augmentation(
    randaug_ops=1, randaug_magnitude=9.0, randaug_variant='timm', interpolation='pil_bilinear',
    mean=(123.675, 116.28, 103.53),
  )  # fmt: skip
  white = np.full((32, 32, 3), 255, np.uint8)
  images = [apply(white, (0, 0, i)) for i in range(60)]
  assert any((image == (124, 116, 104)).all(-1).mean() > 0.3 for image in images)


def test_random_interpolation_is_bilinear_or_bicubic_for_an_image():
  image, options = photo(), {'crop': 'resize', 'flip': False}
  either = [
    train(image, **options, interpolation=f'pil_{name}') for name in ('bilinear', 'bicubic')
  ]
  chosen = []
  for i in range(60):
    out = train(image, **options, interpolation='pil_random', key=(0, 0, i))
    chosen.append([np.array_equal(out, each) for each in either].index(True))
  assert 15 < sum(chosen) < 45


def test_a_simple_crop_of_a_rectangle_covers_it_and_may_show_the_reflection():
  image, size = photo(100, 200), (30, 40)  # Scaled by 0.3 to (30, 60), and padded to (38, 68).
  resized = np.pad(resize_image(image, (30, 60)), ((4, 4), (4, 4), (0, 0)), mode='reflect')
  parts = {resized[y : y + 30, x : x + 40].tobytes() for y in range(9) for x in range(29)}
  crops = {
    train(image, size, crop='simple', flip=False, key=(0, 0, i)).tobytes() for i in range(40)
  }
  assert crops <= parts and len(crops) > 30


def test_a_random_crop_is_flipped_like_any_other_image():
  images = [train(photo(20, 20), (20, 20), crop='random', side=20, key=(0, 0, i)) for i in range(9)]
  flipped = [np.array_equal(image, photo(20, 20)[:, ::-1]) for image in images]
  assert flipped == [bool(random_bits((0, 0, i), 0)[-1] >> 63) for i in range(9)]
  assert 0 < sum(flipped) < 9


def test_float32_is_not_rounded_and_agrees_with_uint8():
  exact = evaluate(photo(), dtype=np.float32)
  assert (exact != np.rint(exact)).any()
  assert np.abs(exact - evaluate(photo())).max() <= 1


def boxes(count: int, h: int = 333, w: int = 500, area=AREA, aspect=ASPECT) -> np.ndarray:
  return np.array(
    [sample_crop_box(h, w, key=(3, 0, i), area=area, aspect=aspect) for i in range(count)]
  )


def test_boxes_are_inside_the_image_and_in_range():
  for h, w, area in [(333, 500, AREA), (500, 200, (0.3, 0.5)), (40, 41, AREA)]:
    y, x, bh, bw = boxes(500, h, w, area).T
    assert (y >= 0).all() and (x >= 0).all() and (y + bh <= h).all() and (x + bw <= w).all()
    fraction = bh * bw / (h * w)
    assert (fraction >= area[0]).all() and (fraction <= area[1]).all()
    assert (np.abs(bw - bh * np.clip(bw / bh, *ASPECT)) <= 0.5 + 1e-9).all()


def test_a_random_resized_crop_resizes_its_box():
  key, image = (2, 0, 1), photo()
  y, x, h, w = sample_resized_crop_box(83, 117, key=key, area=AREA, aspect=ASPECT)
  expected = resize_image(image[y : y + h, x : x + w], (32, 32), 'pil_bicubic')
  options = {'crop': 'random_resized', 'interpolation': 'pil_bicubic', 'flip': False}
  np.testing.assert_array_equal(train(image, key=key, **options), expected)


def test_if_no_box_fits_the_box_is_the_full_image():
  box = sample_crop_box(10, 1000, key=(0, 0, 0), area=(0.9, 1.0), aspect=(1.0, 1.0))
  assert box == (0, 0, 10, 1000)


@pytest.mark.parametrize(('h', 'w'), [(333, 500), (500, 120)])
def test_boxes_have_the_distribution_of_tensorflows(h, w):
  tf = pytest.importorskip('tensorflow')
  stats = pytest.importorskip('scipy.stats')
  theirs = []
  for i in range(2000):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
      (h, w, 3), tf.zeros([0, 0, 4]), (i, 5), 0.0, ASPECT, AREA, use_image_if_no_bounding_boxes=True
    )
    theirs.append([*begin.numpy()[:2], *size.numpy()[:2]])
  ours, theirs = boxes(2000, h, w), np.array(theirs)
  for column in range(4):
    assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


@pytest.mark.parametrize('size', [(224, 224), (32, 32), (17, 300)])
def test_resizing_equals_tensorflows(size):
  tf = pytest.importorskip('tensorflow')
  image = np.random.default_rng(0).integers(0, 256, (333, 500, 3), dtype=np.uint8)
  theirs = tf.image.resize(image, size).numpy()
  assert np.abs(evaluate(image, size, np.float32) - theirs).max() <= 0.02
  assert np.abs(evaluate(image, size).astype(float) - np.rint(theirs)).max() <= 1
  trained = train(image, size, crop='resize', flip=False).astype(float)
  assert np.abs(trained - np.rint(theirs)).max() <= 1


def test_random_crop_reaches_every_position():
  image = np.arange(5 * 8 * 3, dtype=np.uint8).reshape(5, 8, 3)
  parts = {(y, x): image[y : y + 3, x : x + 4] for y in range(3) for x in range(5)}
  crops = [random_crop(image, (3, 4), key=(0, 0, k)) for k in range(200)]
  assert all(any((one == part).all() for one in crops) for part in parts.values())
  out = train(image, size=(3, 3), crop='random', side=3, flip=False)
  np.testing.assert_array_equal(out, resize_image(image, (3, 3)))
