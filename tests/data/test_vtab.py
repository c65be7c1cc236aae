"""VTAB tasks: label rules, the choice of examples, and errors for missing data."""

import pickle

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vit_jax.data.sources import open_source
from vit_jax.data.vtab import LABEL_RULES, MANUAL_DOWNLOADS, VTAB_TASKS, parse_subsplit
from vit_jax.errors import UserError

f32 = lambda *rows: np.array(rows, np.float32)


def test_there_are_19_tasks_in_three_groups():
  groups = [task.group for task in VTAB_TASKS.values()]
  assert {group: groups.count(group) for group in groups} == {
    'natural': 7,
    'specialized': 4,
    'structured': 8,
  }


def test_clevr_counts_three_to_ten_objects():
  rule = LABEL_RULES['count_all']
  assert [
    rule.label_names[rule.compute({'objects/size': np.zeros(n)})] for n in range(3, 11)
  ] == list(map(str, range(3, 11)))


@pytest.mark.parametrize(
  ('depths', 'label'),
  [
    ([7.9, 12], 0),
    ([8.5], 1),
    ([9.2, 8.2], 1),
    ([8.7], 2),
    ([9.1, 30], 3),
    ([9.6], 4),
    ([10.1], 5),
  ],
)
def test_clevr_distance_uses_the_nearest_object(depths, label):
  example = {'objects/pixel_coords': f32(*[[100, 7, depth] for depth in depths]).ravel()}
  assert LABEL_RULES['closest_object_distance'].compute(example) == label


@pytest.mark.parametrize(
  ('types', 'z', 'label'),
  [
    ([0, 3], [7.5, 2], 0),
    ([1, 0], [25, 19], 1),
    ([2], [21], 2),
    ([3, 4], [5, 6], 3),
    ([], [], 3),
    ([0], [-3], 0),
    ([0], [8], 0),  # A distance equal to a threshold is in the bin below it.
  ],
)
def test_kitti_distance_uses_the_nearest_car_van_or_truck(types, z, label):
  """Types 3 and 4 are pedestrians and seated people; class 3 means no vehicle."""
  example = {
    'objects/type': np.array(types, int),
    'objects/location': f32(*[[9, 1, each] for each in z]).ravel(),
  }
  assert LABEL_RULES['closest_vehicle_distance'].compute(example) == label
  assert LABEL_RULES['closest_vehicle_distance'].label_names[3] == 'none'


def test_dsprites_positions_and_orientations_fall_into_16_bins():
  position, orientation = LABEL_RULES['x_position_16'], LABEL_RULES['orientation_16']
  assert [position.compute({'label_x_position': np.array([x])}) for x in range(32)] == [
    x // 2 for x in range(32)
  ]
  assert [orientation.compute({'label_orientation': np.array([x])}) for x in range(40)] == [
    int(x / 2.5) for x in range(40)
  ]
  assert len(position.label_names) == len(orientation.label_names) == 16


def test_subsplits_are_rounded_as_in_the_benchmark():
  sizes = {'train': 3680, 'test': 24_300}
  assert parse_subsplit('train[:800]', sizes, '') == ('train', 0, 800)
  assert parse_subsplit('train[80%:][:200]', sizes, '') == ('train', 2944, 3144)
  assert parse_subsplit('train[90%:][:200]', {'train': 3059}, '') == (
    'train',
    2753,
    2953,
  )  # Caltech101: 0.9 * 3,059 = 2,753.1.
  assert parse_subsplit('test[50%:]', sizes, '') == ('test', 12_150, 24_300)
  assert parse_subsplit('test', sizes, '') == ('test', 0, 24_300)
  with pytest.raises(
    UserError,
    match=r"vtab:x .*train\[:800\] .*'train' .*799",
  ):
    parse_subsplit('train[:800]', {'train': 799}, 'vtab:x')
  with pytest.raises(UserError, match="vtab:x .*'validation'.* train"):
    parse_subsplit('validation', {'train': 1}, 'vtab:x')


@pytest.fixture
def dir(tmp_path, write_tfds, png):
  """Write three of the datasets. The pixels of example i are i % 251, except in dsprites."""
  image = lambda i: png(np.full((2, 2), i % 251, np.uint8))
  plain = {
    'image': tfds.features.Image(shape=(2, 2, 1)),
    'label': tfds.features.ClassLabel(names=['a', 'b', 'c']),
  }
  write_tfds('svhn_cropped', tmp_path, plain, {
    'train': [{'image': image(i), 'label': i % 3} for i in range(2000)],
    'test': [{'image': image(i), 'label': i % 3} for i in range(5)],
  })  # fmt: skip
  clevr = {
    'image': tfds.features.Image(shape=(2, 2, 1)),
    'file_name': tfds.features.Text(),
    'objects': tfds.features.Sequence({
      'size': tfds.features.ClassLabel(names=['small', 'large']),
      'pixel_coords': tfds.features.Tensor(shape=(3,), dtype=np.float32),
    }),
  }  # fmt: skip
  scene = lambda i: [
    {'size': 0, 'pixel_coords': f32(1, 2, 8.2 + i % 2)[0:3]} for _ in range(3 + i % 8)
  ]
  examples = lambda n: [
    {'image': image(i), 'file_name': f'{i}.png', 'objects': scene(i)} for i in range(n)
  ]
  write_tfds('clevr', tmp_path, clevr, {'train': examples(2000), 'validation': examples(9)})
  sprite = {
    'image': tfds.features.Image(shape=(2, 2, 1)),
    'label_orientation': tfds.features.ClassLabel(num_classes=40),
    'label_x_position': tfds.features.ClassLabel(num_classes=32),
  }
  write_tfds('dsprites', tmp_path, sprite, {'train': [
    {'image': png(np.eye(2, dtype=np.uint8)), 'label_orientation': i % 40, 'label_x_position': i % 32}
    for i in range(2000)
  ]})  # fmt: skip
  return str(tmp_path)


def test_the_1000_images_are_those_of_the_benchmark(dir):
  source = open_source('vtab:svhn', 'train+val', dir=dir)
  assert (len(source), source.label_names) == (1000, ('a', 'b', 'c'))
  indices = [*range(800), *range(1800, 2000)]
  for i in (0, 1, 799, 800, 801, 999):
    data, labels, name = source[i]
    assert cv2.imdecode(np.frombuffer(data, np.uint8), 0)[0, 0] == indices[i] % 251
    assert labels == (indices[i] % 3,)
    assert name.startswith('vtab:svhn ')
  assert (
    len(open_source('vtab:svhn', '', dir=dir)),
    len(open_source('vtab:svhn', 'val', dir=dir)),
  ) == (5, 200)


def test_label_rules_read_the_stored_examples(dir):
  count, distance = (
    open_source(f'vtab:clevr_{which}', '', dir=dir) for which in ('count', 'distance')
  )
  assert [count[i][1][0] for i in range(9)] == [
    i % 8 for i in range(9)
  ]  # The test split is CLEVR's validation.
  assert [distance[i][1][0] for i in range(4)] == [1, 3, 1, 3]
  sprites = open_source('vtab:dsprites_orientation', 'val', dir=dir)
  assert [sprites[i][1][0] for i in range(200)] == [int((1600 + i) % 40 / 2.5) for i in range(200)]
  assert sprites[0][0].shape == (2, 2, 3) and set(sprites[0][0].ravel()) == {0, 255}
  again = pickle.loads(pickle.dumps(sprites))
  assert again[7][1:] == sprites[7][1:]


def test_a_missing_manual_download_is_an_error_with_instructions(tmp_path):
  for task in ('resisc45', 'diabetic_retinopathy'):
    with pytest.raises(UserError, match=r'downloads/manual.*data prepare'):
      open_source(f'vtab:{task}', 'train', dir=str(tmp_path))
  assert all(
    any(task.dataset.startswith(name) for task in VTAB_TASKS.values()) for name in MANUAL_DOWNLOADS
  )
  with pytest.raises(UserError, match='data prepare dmlab'):
    open_source('vtab:dmlab', 'train', dir=str(tmp_path))
  with pytest.raises(UserError, match="'clevr'.*'clevr_"):
    open_source('vtab:clevr', 'train')
