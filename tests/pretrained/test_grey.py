"""Single-channel checkpoints: outputs of timm, grey preprocessing of Pillow, and training."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import vit_jax
from tests.pretrained.families import normalised, redrawn, run
from tests.pretrained.released_layout import draw
from tests.pretrained.test_export import model
from tests.tiny import get_config
from vit_jax.config import ModelConfig
from vit_jax.config_checks import validate
from vit_jax.data.augment import Augmentation
from vit_jax.data.images import write_train_image
from vit_jax.data.pillow_ops import grayscale
from vit_jax.errors import UserError
from vit_jax.models.families import build_model
from vit_jax.pretrained.export import export_model
from vit_jax.pretrained.npz import to_google
from vit_jax.settings.fields import with_settings
from vit_jax.training.initial_state import check_init_model
from vit_jax.training.task import make_task

STATISTICS = {'mean': (76.5,), 'scale': (51.0,)}  # 0.3 and 0.2 of 255.
GREY = {'channels': 1, **STATISTICS}
SIZES = {'embed_dim': 48, 'depth': 3, 'num_heads': 3}
TIMM_MODELS = {
  'vit_base_patch16_224': {'img_size': 64, **SIZES},
  'vit_base_patch16_siglip_224': {'img_size': 64, **SIZES},
  'vit_small_patch14_reg4_dinov2': {'img_size': 56, 'num_classes': 0, **SIZES},
  'deit3_small_patch16_224': {'img_size': 64, **SIZES},
  'vit_tiny_r_s16_p8_224': {'img_size': 64, 'depth': 2},
  'tf_efficientnet_b0': {},
  'efficientnet_b0': {},
}


def saved(theirs, folder, name: str, arguments: dict, **pretrained):
  """Write the arrays and the config.json of a timm model, as timm does."""
  folder.mkdir(exist_ok=True)
  arrays = {key: np.ascontiguousarray(value) for key, value in theirs.state_dict().items()}
  save_file(arrays, folder / 'model.safetensors')
  config = {'architecture': name, 'model_args': arguments, 'pretrained_cfg': pretrained}
  (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
  return str(folder)


@pytest.mark.parametrize('name', TIMM_MODELS)
def test_a_grey_model_of_timm_has_timms_outputs(tmp_path, timm, name):
  arguments = {'in_chans': 1, 'num_classes': 10} | TIMM_MODELS[name]
  theirs = redrawn(timm.create_model(name, **arguments))
  side = arguments.get('img_size', 64)
  pretrained = {'mean': [0.3], 'std': [0.2], 'input_size': [1, side, side], 'crop_pct': 0.9}
  ours = vit_jax.load(saved(theirs, tmp_path / 'timm', name, arguments, **pretrained))
  assert ours.config.channels == ours.preprocessing.channels == 1
  assert ours.preprocessing.mean == pytest.approx((76.5,))
  images = np.random.default_rng(0).integers(0, 256, (3, *ours.size, 1), np.uint8)
  expected = run(theirs, images, **STATISTICS)
  got = np.asarray((ours.logits if ours.classes else ours.features)(images))
  assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


def test_a_grey_model_of_transformers_has_its_logits(tmp_path, transformers):
  import torch

  config = transformers.ViTConfig(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96,
    image_size=64, patch_size=16, num_channels=1, num_labels=10,
  )  # fmt: skip
  theirs = redrawn(transformers.ViTForImageClassification(config))
  theirs.save_pretrained(tmp_path)
  transformers.ViTImageProcessor(
    size={'height': 64, 'width': 64}, image_mean=[0.3], image_std=[0.2]
  ).save_pretrained(tmp_path)
  ours = vit_jax.load(str(tmp_path))
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 1), np.uint8)
  with torch.no_grad():
    expected = theirs(normalised(images, **STATISTICS)).logits.numpy()
  assert np.abs(np.asarray(ours.logits(images)) - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize('kind', ['token', 'map'])
def test_timm_reads_a_grey_export_and_converts_to_grey(tmp_path, timm, kind):
  ours = model(pool=kind, **GREY)
  export_model(ours, tmp_path / 'timm', 'timm')
  theirs = timm.create_model(f'local-dir:{tmp_path / "timm"}', pretrained=True)
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)
  expected = run(theirs, images, **STATISTICS)
  assert np.abs(np.asarray(ours.logits(images)) - expected).max() <= 2e-5 * np.abs(expected).max()
  data = timm.data.resolve_model_data_config(theirs)
  assert data['input_size'] == (1, 32, 32)  # Its scripts then open images in the mode L.
  assert data['mean'] == pytest.approx([0.3]) and data['std'] == pytest.approx([0.2])
  again = vit_jax.load(str(tmp_path / 'timm'))
  assert (again.config.channels, again.preprocessing.mean) == (1, pytest.approx((76.5,)))


@pytest.mark.parametrize('format', ['npz', 'huggingface', 'onnx', 'stablehlo'])
def test_a_grey_model_is_exported_with_its_channel(tmp_path, format):
  ours = model(**GREY)
  to = tmp_path / ('model.npz' if format == 'npz' else 'out')
  export_model(ours, to, format)  # It compares outputs.
  if format in ('npz', 'huggingface'):
    again = vit_jax.load(str(to))
    assert (again.config.channels, again.config.mean) == (1, (76.5,))
    assert again.preprocessing == dataclasses.replace(
      ours.preprocessing, rounding=again.preprocessing.rounding
    )
  if format == 'onnx':
    import onnxruntime

    session = onnxruntime.InferenceSession(to)
    assert session.get_inputs()[0].shape == ['b', 32, 32, 1]
    metadata = session.get_modelmeta().custom_metadata_map
    assert 'grey' in metadata['input'] and json.loads(metadata['mean']) == pytest.approx([0.3])
    steps = json.loads(metadata['preprocessing_steps'])
    assert "Convert to grey as Pillow's mode L (ITU-R 601)." in steps


@pytest.mark.parametrize('channels', [2, 4, 13])
def test_other_numbers_of_channels_are_refused_by_their_number(tmp_path, channels):
  flat = draw(ModelConfig(variant='mu/8'), 5, (32, 32))
  kernel = np.zeros((8, 8, channels, flat['embedding/kernel'].shape[-1]), np.float32)
  np.savez(tmp_path / 'file.npz', **to_google(flat | {'embedding/kernel': kernel}))
  with pytest.raises(UserError, match=rf'images of {channels} channels; supported are 3') as error:
    vit_jax.load(str(tmp_path / 'file.npz'))
  assert '\n' not in str(error.value)


def test_statistics_of_three_channels_become_one_only_if_that_is_sure(tmp_path, timm):
  name, arguments = 'vit_base_patch16_224', {'in_chans': 1, 'img_size': 32, **SIZES}
  theirs = redrawn(timm.create_model(name, **arguments))
  imagenet = {'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225]}
  equal = saved(theirs, tmp_path / 'a', name, arguments, mean=[0.5] * 3, std=[0.25] * 3)
  assert vit_jax.load(equal).config.mean == (127.5,)
  three = saved(theirs, tmp_path / 'b', name, arguments, crop_pct=0.9, **imagenet)
  with pytest.raises(UserError, match='one channel.*give one, mean=NUMBER'):
    vit_jax.load(three)
  assert vit_jax.load(three, mean=0.1307, std=(0.3081,)).config.scale == (round(0.3081 * 255, 6),)
  assumed = vit_jax.load(saved(theirs, tmp_path / 'c', name, arguments, crop_pct=0.9))
  assert assumed.config.mean == pytest.approx((255 * (0.485 + 0.456 + 0.406) / 3,))
  assert any('one channel: assuming mean 0.449' in note for note in assumed.notes)
  (tmp_path / 'file.json').write_text('{"channels": 3}', encoding='utf-8')
  np.savez(tmp_path / 'file.npz', **to_google(draw(ModelConfig(variant='mu/8', **GREY), 5, (8, 8))))
  with pytest.raises(UserError, match='channels=3 is stated, but its arrays are for 1'):
    vit_jax.load(str(tmp_path / 'file.npz'))


def photo(side: tuple[int, int], seed: int) -> Image.Image:
  """Return a smooth picture whose colors differ strongly."""
  noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
  return Image.fromarray(noise).resize(side, Image.Resampling.BICUBIC)


def test_conversion_to_grey_is_pillows_on_every_kind_of_color():
  rgb = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
  grey = grayscale(rgb)
  # ITU-R 601-2 luma, rounded: in Pillow's documentation L = R * 299/1000 + G * 587/1000 + …
  luma = np.floor(rgb.astype(np.float64) @ [0.299, 0.587, 0.114] + 0.5)
  assert np.abs(grey[..., 0] - luma).max() <= 1 and np.mean(grey[..., 0] != luma) < 1e-3
  np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(rgb).convert('L')))
  equal = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
  np.testing.assert_array_equal(grayscale(equal), equal)


def test_predict_on_a_color_photo_is_timms_transform_in_mode_l(tmp_path, timm):
  import torch

  ours = model(**GREY)
  export_model(ours, tmp_path / 'timm', 'timm')
  image = photo((90, 70), 0)
  image.save(tmp_path / 'photo.png')
  image.convert('L').save(tmp_path / 'grey.png')
  theirs = timm.create_model(f'local-dir:{tmp_path / "timm"}', pretrained=True).eval()
  transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
  with torch.no_grad():
    expected = theirs(transform(image.convert('L'))[None]).softmax(-1)[0].numpy()
  loaded = vit_jax.load(str(tmp_path / 'timm'))
  color, grey = loaded.predict([tmp_path / 'photo.png', tmp_path / 'grey.png'], top=5)
  by_name = dict(zip(color.labels, color.probabilities, strict=True))
  np.testing.assert_allclose([by_name[f'é{i}'] for i in range(5)], expected, atol=2e-3)
  assert grey.probabilities == color.probabilities


@pytest.mark.parametrize('variant', ['intended', 'big_vision', 'timm'])
def test_a_grey_training_image_is_augmented_like_the_photo_in_mode_l(variant):
  buffer, grey_buffer = io.BytesIO(), io.BytesIO()
  photo((60, 50), 1).save(buffer, 'PNG')
  photo((60, 50), 1).convert('L').save(grey_buffer, 'PNG')
  options = {
    'name': 'x', 'crop': 'inception', 'area': (0.3, 1.0), 'aspect': (0.75, 1.33), 'side': 0,
    'augment': Augmentation(
      randaug_ops=3, randaug_magnitude=12.0, randaug_variant=variant, interpolation='pil_random',
      three_augment=variant == 'timm', color_jitter=0.4, random_erasing=0.5,
    ),
    'flip': True,
    'decoding': {'max_pixels': 10**6},
  }  # fmt: skip
  for example in range(60):  # Every operation of RandAugment occurs.
    one, three = np.empty((24, 24, 1), np.uint8), np.empty((24, 24, 3), np.uint8)
    write_train_image(buffer.getvalue(), one, key=(0, 0, example), **options)
    write_train_image(grey_buffer.getvalue(), three, key=(0, 0, example), **options)
    np.testing.assert_array_equal(np.repeat(one, 3, axis=2), three)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Return a folder with the same photos in 'color' and in 'grey', and a checkpoint, 'grey.npz'."""
  root = tmp_path_factory.mktemp('photos')
  for split, label, i in ((s, c, i) for s in ('train', 'test') for c in 'ab' for i in range(8)):
    for kind in ('color', 'grey'):
      folder = root / kind / split / label
      folder.mkdir(parents=True, exist_ok=True)
      image = photo((30, 30), i + 100 * (label == 'b'))
      (image if kind == 'color' else image.convert('L')).save(folder / f'{i}.png')
  export_model(model(heads=2, **GREY), root / 'grey.npz', 'npz')
  return root


def fine_tuning(folders, kind: str = 'grey', **settings):
  settings = {
    'init': str(folders / 'grey.npz'), 'data.train': f'folder:{folders / kind}', 'steps': 3,
    'data.size': (32, 32), 'data.randaug_ops': 2, 'data.randaug_magnitude': 9.0,
    'data.interpolation': 'pil_bicubic', 'model.variant': 'mu/8', 'model.heads': 2,
    'model.channels': 1, 'model.mean': (76.5,), 'model.scale': (51.0,), 'optim.warmup': '0',
  } | settings  # fmt: skip
  return with_settings(get_config(), settings)


def test_fine_tuning_on_color_is_fine_tuning_on_the_same_photos_in_grey(folders, tmp_path):
  from vit_jax.train import train

  results = []
  for kind in ('color', 'grey'):
    train(fine_tuning(folders, kind), tmp_path / kind)
    found = vit_jax.load(str(tmp_path / kind))
    assert found.config.channels == found.preprocessing.channels == 1
    assert found.preprocessing.mean == (76.5,)
    results.append(found.params['embedding']['kernel'])
    records = (tmp_path / kind / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    results.append([json.loads(line).get('test_loss') for line in records])
  np.testing.assert_array_equal(results[0], results[2])
  assert results[1] == results[3]
  assert results[0].shape[2] == 1
  start = vit_jax.load(str(folders / 'grey.npz')).params['embedding']['kernel']
  assert 0 < np.abs(results[0] - start).max() < 0.1
  export_model(found, tmp_path / 'run.onnx', 'onnx')
  (prediction,) = found.predict([folders / 'color' / 'test' / 'a' / '0.png'], top=1)
  assert prediction.labels[0] in 'ab'


def test_pre_training_from_scratch_on_grey_images_needs_one_setting(tmp_path):
  from vit_jax.train import train

  config = with_settings(get_config(), {'model.channels': 1, 'steps': 3})
  train(config, tmp_path / 'run')
  found = vit_jax.load(str(tmp_path / 'run'))
  assert (found.config.channels, found.config.mean) == (1, (127.5,))


@pytest.mark.parametrize('channels', [1, 3])
def test_a_model_of_other_channels_is_refused_with_the_flags_to_add(folders, channels):
  pretrained = model(heads=2, **(GREY if channels == 1 else {}))
  other = {'model.channels': 4 - channels, 'model.mean': (76.5,) * (4 - channels)}
  config = fine_tuning(folders, **other, **{'model.scale': (51.0,) * (4 - channels)})
  with pytest.raises(UserError, match=rf'--config\.model\.channels={channels} --config') as error:
    check_init_model(validate(config), pretrained)
  assert '--config.model.mean=' in str(error.value)


def test_settings_that_contradict_the_channels_are_errors(folders):
  valid = fine_tuning(folders)
  for settings, message in (
    ({'model.channels': 2}, 'channels=2'),
    ({'model.channels': 3}, 'mean=.76.5,. does not fit config.model.channels=3'),
    ({'model.mean': (1.0, 2.0, 3.0)}, 'does not fit config.model.channels=1'),
  ):
    with pytest.raises(UserError, match=message):
      validate(with_settings(valid, settings))
  with pytest.raises(UserError, match='does not fit'):
    build_model(ModelConfig(variant='mu/8', channels=1), 5)
  masked = {'mask.target': 'colour', 'init': '', 'mixup': 0.0}
  with pytest.raises(UserError, match='predicts colors'):
    make_task(validate(with_settings(valid, masked)))
  make_task(validate(with_settings(valid, masked | {'mask.target': 'pixels'})))


def test_images_of_the_wrong_number_of_channels_are_a_one_line_error():
  with pytest.raises(UserError, match=r'expected uint8 \[b, 32, 32, 1\]'):
    model(**GREY).logits(np.zeros((1, 32, 32, 3), np.uint8))


def test_flops_count_the_channels():
  shape = build_model(ModelConfig(variant='B/16'), 0).shape
  # 196 patches of 16 x 16 pixels, 768 numbers each, a multiplication and an addition.
  assert shape.flops((224, 224), 3) - shape.flops((224, 224), 1) == 2 * 196 * 2 * 256 * 768
