"""The steps of preprocessing: their order, their form in JSON, and images of the user."""

import dataclasses
import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.photo import photo
from vit_jax.config import Config, DataConfig
from vit_jax.data.images import write_eval_image
from vit_jax.data.loader import eval_batches, train_batches
from vit_jax.data.preprocessing import (
  Preprocessing,
  apply_preprocessing,
  eval_preprocessing,
  preprocessing_from_dict,
  resized_size,
)
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError

STEPS = Preprocessing(
  size=(20, 30), crop='squash', resize_size=(24, 36), interpolation='pil_bicubic',
  rounding='timm', orient='exif', jpeg_dct='accurate', mean=(1, 2.5, 3), scale=(4, 5, 6),
)  # fmt: skip


def applied(image: np.ndarray, dtype=np.uint8, **steps) -> np.ndarray:
  steps = Preprocessing(**steps)
  out = np.empty((*steps.size, 3), dtype)
  apply_preprocessing(image, steps, out)
  return out


def test_squash_resizes_without_the_aspect_and_crops_the_center():
  image = photo(83, 117)
  whole = Image.fromarray(image).resize((36, 24), Image.Resampling.BILINEAR)
  got = applied(
    image, size=(20, 30), crop='squash', resize_size=(24, 36), interpolation='pil_bilinear'
  )
  np.testing.assert_array_equal(got, np.asarray(whole)[2:22, 3:33])


def test_border_fits_the_image_in_and_pads_with_the_mean():
  got = applied(
    photo(60, 120), size=(40, 40), crop='border', resize_size=(40, 40), mean=(9, 99.6, 200)
  )
  np.testing.assert_array_equal(got[10:30], cv2.resize(photo(60, 120), (40, 20)))
  for rows in (got[:10], got[30:]):
    assert (rows == (9, 100, 200)).all()


def test_none_crops_the_center_and_pads_with_black():
  image = photo(50, 20)
  got = applied(image, size=(30, 30), crop='none')
  np.testing.assert_array_equal(got[:, 5:25], image[10:40])
  assert not got[:, :5].any() and not got[:, 25:].any()


@pytest.mark.parametrize(
  ('rounding', 'size', 'expected'),
  # 500 * 256 / 333 = 384.4; 500 * 233 / 333 = 349.8.
  [('tf', 256, 384), ('tf', 233, 350), ('timm', 233, 349), ('transformers', 233, 349)],
)
def test_the_long_side_is_rounded_as_the_library_does(rounding, size, expected):
  steps = Preprocessing(size=(224, 224), crop='center', resize_size=(size,) * 2, rounding=rounding)
  assert resized_size((333, 500), steps) == (size, expected)
  assert resized_size((500, 333), steps) == (expected, size)


def test_steps_survive_json():
  text = json.dumps(STEPS.to_dict())
  assert preprocessing_from_dict(json.loads(text), 'x.json') == STEPS


def test_steps_of_older_versions_are_what_the_code_did_then():
  old = {'size': [8, 8], 'crop': 'center', 'short_side': 9, 'mean': [1, 2, 3], 'scale': [1, 1, 1]}
  steps = preprocessing_from_dict(old, 'x.json')
  assert (steps.crop, steps.resize_size) == ('center', (9, 9))
  assert (steps.interpolation, steps.rounding) == ('tf_bilinear', 'tf')
  assert steps.decoding(user_file=True) == {'orient': False, 'fast_dct': True}
  assert preprocessing_from_dict(old | {'crop': 'resize'}, 'x.json').resize_size is None


WRONG = {
  'crop': 'middle', 'interpolation': 'bilinear', 'rounding': 'torch', 'orient': True,
  'jpeg_dct': 1, 'size': [8], 'resize_size': [0, 8], 'mean': [1, 2], 'scale': [1, 0, 1],
}  # fmt: skip


@pytest.mark.parametrize('name', WRONG)
def test_an_unsupported_step_is_one_line_that_names_file_and_field(name):
  with pytest.raises(UserError, match=f'^x.json: {name}=.* is not supported; expected') as error:
    preprocessing_from_dict(STEPS.to_dict() | {name: WRONG[name]}, 'x.json')
  assert '\n' not in str(error.value)


def test_sizes_are_limited():
  for name in ('size', 'resize_size'):
    with pytest.raises(UserError, match='32768'):
      preprocessing_from_dict(STEPS.to_dict() | {name: (30000, 40000)}, 'x.json')


def test_a_missing_or_surplus_step_is_an_error():
  content = STEPS.to_dict()
  del content['rounding']
  with pytest.raises(UserError, match='rounding is missing'):
    preprocessing_from_dict(content, 'x.json')
  with pytest.raises(UserError, match="'resise'.*|resise"):
    preprocessing_from_dict(STEPS.to_dict() | {'resise': 1}, 'x.json')
  for crop, resize_size in (('resize', (8, 8)), ('center', None)):
    changes = {'crop': crop, 'resize_size': resize_size}
    with pytest.raises(UserError, match='resize_size'):
      preprocessing_from_dict(STEPS.to_dict() | changes, 'x.json')


@pytest.fixture
def folder(tmp_path):
  """Return a folder of JPEGs that a phone stored sideways, with the tag to turn them."""
  exif = Image.Exif()
  exif[0x0112] = 6
  for split in ('train', 'test'):
    for name in ('cat', 'dog'):
      path = tmp_path / split / name / '1.jpg'
      path.parent.mkdir(parents=True)
      Image.fromarray(photo(64, 96)).save(path, exif=exif, quality=90)
  return tmp_path


def test_photos_of_a_folder_are_turned_upright_and_decoded_accurately(folder):
  image = Image.open(folder / 'test' / 'cat' / '1.jpg')
  stored, upright = np.asarray(image), np.asarray(ImageOps.exif_transpose(image))
  source = open_source(f'folder:{folder}', 'test')
  data = DataConfig(size=upright.shape[:2], batch=2, crop='resize', flip=False)
  (batch,) = eval_batches(source, data, host=0, hosts=1)
  np.testing.assert_array_equal(batch['image'][0], upright)
  batch = next(train_batches(source, data, seed=0, start=0, host=0, hosts=1))
  np.testing.assert_array_equal(batch['image'][0], upright)
  data = dataclasses.replace(data, size=stored.shape[:2], orient='ignore')
  (batch,) = eval_batches(source, data, host=0, hosts=1)
  np.testing.assert_array_equal(batch['image'][0], stored)
  fast = dataclasses.replace(data, jpeg_dct='fast')
  (batch,) = eval_batches(source, fast, host=0, hosts=1)
  assert 0 < np.abs(batch['image'][0].astype(int) - stored).mean() < 2


class Records:
  """The photos of a folder as records of a published data set."""

  max_labels, split = 1, 'test'

  def __init__(self, folder):
    self.data = (folder / 'test' / 'cat' / '1.jpg').read_bytes()

  def __len__(self) -> int:
    return 2

  def __getitem__(self, i: int):
    return self.data, (0,), f'record {i}'


def test_records_of_published_data_are_decoded_as_tensorflow_does(folder):
  records = Records(folder)
  data = DataConfig(size=(64, 96), batch=2, crop='resize', flip=False)
  out = np.empty((64, 96, 3), np.uint8)
  fast = Preprocessing(size=(64, 96), orient='ignore', jpeg_dct='fast')
  write_eval_image(records.data, out, name='x', steps=fast, user_file=True, max_pixels=10**8)
  for batch in (
    next(eval_batches(records, data, host=0, hosts=1)),
    next(train_batches(records, data, seed=0, start=0, host=0, hosts=1)),
  ):
    np.testing.assert_array_equal(batch['image'][0], out)
  steps = dataclasses.replace(fast, orient='exif', jpeg_dct='accurate', size=(96, 64))
  data = dataclasses.replace(data, size=(96, 64))
  (batch,) = eval_batches(records, data, host=0, hosts=1, steps=steps)
  expected = ImageOps.exif_transpose(Image.open(io.BytesIO(records.data)))
  np.testing.assert_array_equal(batch['image'][0], np.asarray(expected))


def test_training_resizes_with_the_interpolation_of_the_run_and_bilinearly_for_areas(folder):
  source = open_source(f'folder:{folder}', 'test')
  image = ImageOps.exif_transpose(Image.open(folder / 'test' / 'cat' / '1.jpg'))
  expected = {
    'pil_bicubic': np.asarray(image.resize((20, 30), Image.Resampling.BICUBIC)),
    'tf_area': cv2.resize(np.asarray(image), (20, 30), interpolation=cv2.INTER_LINEAR),
  }
  for interpolation, pixels in expected.items():
    data = DataConfig(
      size=(30, 20), batch=2, crop='resize', flip=False, interpolation=interpolation
    )
    batch = next(train_batches(source, data, seed=0, start=0, host=0, hosts=1))
    np.testing.assert_array_equal(batch['image'][0], pixels)


def test_the_steps_of_a_run_are_its_settings():
  data = DataConfig(
    size=(30, 30), eval_crop='center', eval_short_side=40, interpolation='pil_lanczos',
    orient='exif', jpeg_dct='fast',
  )  # fmt: skip
  assert eval_preprocessing(data) == Preprocessing(
    size=(30, 30), crop='center', resize_size=(40, 40), interpolation='pil_lanczos',
    orient='exif', jpeg_dct='fast',
  )  # fmt: skip
  assert eval_preprocessing(Config().data).resize_size is None
