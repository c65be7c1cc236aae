"""The figures of a model: their arrays, their files, and numbers of an untrained model."""

import csv

import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.pretrained.released_layout import google_file
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.evaluate.predict import ImageFiles, find_image_files
from vit_jax.paper import attention_distance, attention_rollout, figures


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> ImageFiles:
  root, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
  for i in range(3):
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(root / f'{i}.png')
  return ImageFiles(tuple(find_image_files([str(root)])))


def made(path, variant='mu/8', **fields):
  google_file(
    path / 'model.npz', ModelConfig(variant=variant, depth=3, **fields), classes=3, size=(32, 32)
  )
  return vit_jax.load(str(path / 'model.npz'))


@pytest.mark.parametrize('fields', [{}, {'pool': 'gap'}], ids=['class token', 'mean'])
def test_the_analysis_equals_the_models_attention_with_any_batch_size(
  tmp_path, photos, monkeypatch, fields
):
  model = made(tmp_path, **fields)
  images = np.stack([np.asarray(Image.open(path)) for path in photos.paths])
  attention, first = np.asarray(model.attention(images)), int(not fields)
  monkeypatch.setattr(figures, 'MAX_ATTENTION_BYTES', 1)  # One image at a time.
  analysis = figures.analyze_model(model, photos)
  np.testing.assert_array_equal(analysis.images, images)
  np.testing.assert_allclose(
    analysis.attention_distances,
    attention_distance.mean_attention_distance(attention, (4, 4), (8, 8), first=first).mean(axis=0),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    analysis.rollout_masks,
    attention_rollout.rollout_mask(
      attention_rollout.attention_rollout(attention), (4, 4), token=not fields
    ),
    rtol=1e-5,
  )
  assert analysis.uniform_distance == pytest.approx(
    attention_distance.patch_distances((4, 4), (8, 8)).mean()
  )


def test_a_model_of_grey_images_shows_the_photos_in_grey(tmp_path, photos):
  model = made(tmp_path, channels=1, mean=(127.5,), scale=(127.5,))
  analysis = figures.analyze_model(model, photos)
  grey = [Image.open(path).convert('L').convert('RGB') for path in photos.paths]
  np.testing.assert_array_equal(analysis.images, np.stack([np.asarray(image) for image in grey]))
  written = figures.save_figures(analysis, tmp_path / 'out', title='grey', blur=8)
  assert not [path for path in written if 'filters' in str(path)]  # Filters are drawn for RGB only.


def test_every_figure_is_a_picture_and_a_file_of_its_numbers(tmp_path, photos):
  analysis = figures.analyze_model(made(tmp_path), photos)
  written = figures.save_figures(analysis, tmp_path / 'out', title='mu/8', blur=8)
  names = [
    'filters.png',
    'filters.npz',
    'positions.png',
    'positions.npz',
    'distance.png',
    'distance.csv',
    'rollout.png',
    'rollout.npz',
  ]
  assert [path.name for path in written] == names
  for path in written[::2]:
    assert np.ptp(np.asarray(Image.open(path).convert('L'))) > 100
  rows = list(
    csv.DictReader((tmp_path / 'out' / 'distance.csv').read_text(encoding='utf-8').splitlines())
  )
  assert [float(row['mean_attention_distance_px']) for row in rows] == pytest.approx(
    analysis.attention_distances.ravel(), abs=0.006
  )
  np.testing.assert_allclose(
    np.load(tmp_path / 'out' / 'positions.npz')['cosines'], analysis.position_cosines, atol=1e-6
  )


def test_without_images_only_filters_and_positions_are_drawn(tmp_path):
  analysis = figures.analyze_model(made(tmp_path))
  assert (analysis.attention_distances, analysis.rollout_masks) == (None, None)
  assert [path.name for path in figures.save_figures(analysis, tmp_path, title='', blur=8)][
    ::2
  ] == [
    'filters.png',
    'positions.png',
  ]


def test_a_hybrid_has_no_pixel_filters_and_its_patches_have_the_side_of_its_stride(
  tmp_path, photos
):
  model = made(tmp_path, 'R1.1+mu/8', stem_width=32)
  analysis = figures.analyze_model(model, photos)
  assert analysis.filter_components is None
  assert analysis.uniform_distance == pytest.approx(
    attention_distance.patch_distances((4, 4), (8, 8)).mean()
  )
  assert 'filters: slow waves' not in figures.summarize_analysis(analysis)


def test_an_untrained_model_has_uniform_attention_and_dissimilar_positions(tmp_path, photos):
  numbers = figures.summarize_analysis(
    figures.analyze_model(figures.reinitialize_model(made(tmp_path)), photos)
  )
  assert numbers['distance: last layer, mean'] == pytest.approx(1, abs=0.05)
  assert abs(numbers['positions: cosine, neither']) < 0.1


def test_the_papers_numbers_are_among_the_summaries():
  columns = figures.published_summaries()
  assert columns['ViT-L/16']['distance: first layer, min'] * 116.5 == pytest.approx(8.0, abs=0.05)
  assert columns['R50x1+ViT-L/16']['distance: first layer, min'] * 116.5 == pytest.approx(
    36.5, abs=0.05
  )
  assert columns['ViT-L/16']['distance: last layer, mean'] * 116.5 == pytest.approx(116.0, abs=0.1)
  assert columns['fig7_center_vit_l32']['positions: cosine, neighbours'] == pytest.approx(
    0.665, abs=1e-3
  )


def test_a_directory_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'file.* cannot be written'):
    figures.save_figures(
      figures.analyze_model(made(tmp_path)), tmp_path / 'file' / 'out', title='', blur=8
    )


def test_attention_without_the_distillation_token_keeps_the_class_token_and_the_patches():
  attention = np.arange(2 * 6 * 6).reshape(
    1, 1, 2, 6, 6
  )  # A class, a distillation token, 4 patches.
  kept = figures.without_distillation_token(attention, ModelConfig(distillation_token=True))
  rest = [0, 2, 3, 4, 5]
  np.testing.assert_array_equal(kept, attention[..., rest, :][..., rest])
  assert figures.without_distillation_token(attention, ModelConfig()) is attention
