"""Opening sources by name: built-in datasets, split syntax and errors."""

import concurrent.futures
import gzip
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vit_jax.data.array_store import BUILTIN_LABEL_NAMES
from vit_jax.data.decode import decode_image
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError

BUILTIN_FOLDER = Path(__file__).parents[2] / 'vit_jax' / 'data' / 'builtin'
DEBIAN = Path('/usr/share/datasets/fashion-mnist')


@pytest.mark.parametrize(
  ('name', 'train', 'test', 'shape'),
  [('builtin:fashion_mnist', 30_000, 10_000, (28, 28)), ('builtin:digits', 1_297, 500, (8, 8))],
)
def test_builtin_datasets_have_their_documented_sizes_and_every_class(name, train, test, shape):
  for split, count in (('train', train), ('', test)):
    source = open_source(name, split)
    assert (len(source), source.classes, source.max_labels) == (count, 10, 1)
    assert source.split == (split or 'test')
    image, labels, _ = source[count - 1]
    assert (image.shape, image.dtype, len(labels)) == (shape, np.uint8, 1)
    few = source.subsample(400)
    assert {few[i][1][0] for i in range(len(few))} == set(range(10))


def test_digits_hold_out_50_images_of_each_class_and_span_black_to_white():
  source = open_source('builtin:digits', 'test')
  labels = [source[i][1][0] for i in range(len(source))]
  assert np.bincount(labels).tolist() == [50] * 10
  images = np.stack([source[i][0] for i in range(len(source))])
  assert (images.min(), images.max()) == (0, 255)


def test_threads_that_need_the_images_at_the_same_time_load_them_once(monkeypatch):
  load, loading = np.load, []

  def slow_load(*args, **kwargs):
    loading.append(threading.get_ident())
    time.sleep(0.2)  # The other threads call it meanwhile.
    return load(*args, **kwargs)

  source = open_source('builtin:digits', 'train')
  monkeypatch.setattr(np, 'load', slow_load)
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    images = [image for image, _, _ in threads.map(source.__getitem__, [5] * 8)]
  assert len(loading) == 1
  with load(BUILTIN_FOLDER / 'digits.npz') as arrays:
    expected = arrays['train_images'][5]
  assert all(np.array_equal(image, expected) for image in images)


def test_package_data_is_small_and_has_licenses():
  assert sum(path.stat().st_size for path in BUILTIN_FOLDER.iterdir() if path.is_file()) <= 16e6
  for name in BUILTIN_LABEL_NAMES:
    assert 'Copyright (c)' in (BUILTIN_FOLDER / f'LICENSE.{name}').read_text(encoding='utf-8')


@pytest.mark.skipif(not DEBIAN.is_dir(), reason='needs the Debian package dataset-fashion-mnist')
def test_builtin_fashion_mnist_equals_the_original_in_its_order():
  for split, prefix in (('train', 'train'), ('test', 't10k')):
    pixels = gzip.decompress((DEBIAN / f'{prefix}-images-idx3-ubyte.gz').read_bytes())[16:]
    labels = gzip.decompress((DEBIAN / f'{prefix}-labels-idx1-ubyte.gz').read_bytes())[8:]
    source = open_source('builtin:fashion_mnist', split)
    for i in (0, 1, 777, len(source) - 1):
      image, (label,), _ = source[i]
      assert image.tobytes() == pixels[i * 784 : (i + 1) * 784]
      assert label == labels[i]


@pytest.mark.parametrize(
  ('spec', 'expected'),
  [
    ('train', [*range(10)]),
    ('train[:98%]', [*range(10)]),  # TFDS rounds to the closest.
    ('train[30%:60%]', [3, 4, 5]),
    ('train[-2:]', [8, 9]),
    ('train[8:]+validation[1:3]', [8, 9, 1, 2]),
    ('train[:2]+train[:2]', [0, 1, 0, 1]),
    ('train[0shard]', [*range(10)]),
    ('', [0, 1, 2, 3]),  # `test` has no labels, so `validation`.
  ],
)
def test_splits_follow_tfds_syntax(numbered, spec, expected):
  source = open_source('tfds:numbered', spec, dir=str(numbered))
  pixels = [
    int(decode_image(source[i][0], name='', max_pixels=100)[0, 0, 0]) for i in range(len(source))
  ]
  assert pixels == expected
  assert [source[i][1] for i in range(len(source))] == [(i % 3,) for i in expected]


def test_a_combined_split_has_its_base_names_and_sizes():
  assert open_source('builtin:digits', 'train[98%:]').split == 'train'
  both = open_source('builtin:digits', 'test[:3]+train[5:]')
  assert (both.split, both.split_sizes) == ('test+train', {'test': 3, 'train': 1292})
  assert both[3][2] == 'builtin:digits train #5'
  assert len(open_source('builtin:digits', 'all')) == 1797
  with pytest.raises(IndexError):
    both[len(both)]


@pytest.mark.parametrize(
  ('start', 'stop', 'expected'),
  [
    (0, 2, ['test #0', 'test #1']),
    (2, 5, ['test #2', 'train #5', 'train #6']),
    (4, 5, ['train #6']),
    (1294, 9999, ['train #1296']),
  ],
)
def test_a_slice_may_span_several_splits(start, stop, expected):
  part = open_source('builtin:digits', 'test[:3]+train[5:]').slice(start, stop)
  assert [part[i][2] for i in range(len(part))] == [f'builtin:digits {name}' for name in expected]


@pytest.mark.parametrize('kind', ['builtin', 'folder', 'csv', 'tfds'])
def test_an_unpickled_source_gives_the_same_examples(kind, flat, tmp_path, request):
  csv = tmp_path / 'labels.csv'
  csv.write_text(
    ''.join(f'{path},{path.parent.name}\n' for path in sorted(flat.glob('*/*.jpg'))),
    encoding='utf-8',
  )
  where = {'builtin': 'digits', 'folder': flat, 'csv': csv, 'tfds': 'numbered'}[kind]
  dir = request.getfixturevalue('numbered') if kind == 'tfds' else ''
  source = open_source(f'{kind}:{where}', 'train', dir=str(dir))
  before = source[3]
  packed = pickle.dumps(source)
  assert len(packed) < 8192
  after = pickle.loads(packed)[3]
  assert np.array_equal(before[0], after[0])
  assert before[1:] == after[1:]


@pytest.mark.parametrize(
  ('name', 'split', 'error'),
  [
    ('digits', '', "Did you mean 'builtin:digits'"),
    ('cifar10', '', "Did you mean 'tfds:cifar10'"),
    ('foldr:x', '', "Did you mean 'folder'"),
    ('builtin:digit', '', "Did you mean 'digits'"),
    ('builtin:digits', 'val', "'val'.* train, test"),
    ('builtin:digits', 'tran', "Did you mean 'train'"),
    ('builtin:digits', 'train[:x]', 'train\\[:x\\]'),
    ('builtin:digits', 'train[:9999]', '1297'),
    ('builtin:digits', 'train[:0]', 'train\\[:0\\]'),
    ('folder:/no/such', '', '/no/such'),
    ('csv:/no/such.csv', '', '/no/such.csv'),
    ('tfds:imagenet21k', '', 'folder:PATH'),
    ('tfds:cifr10', '', "'cifr10'.*'cifar10'"),
    (
      'tfds:cifar10',
      '',
      'python -m vit_jax data prepare cifar10 --dir=',
    ),
    ('tfds:CIFAR 10', '', 'tfds:CIFAR 10: '),
  ],
)
def test_a_wrong_name_or_split_is_a_one_line_error(name, split, error, tmp_path):
  with pytest.raises(UserError, match=error) as caught:
    open_source(name, split, dir=str(tmp_path))
  assert '\n' not in str(caught.value)
