"""The catalogue compared with published facts, and names that refer to AugReg's own list."""

import collections
import csv
import math

import jax
import pytest

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.vit import build_vit
from vit_jax.pretrained import catalogue
from vit_jax.pretrained.catalogue import (
  find_checkpoint,
  find_checkpoint_of_file,
  released_checkpoints,
  suggest_names,
)
from vit_jax.pretrained.published_size import SIZE_UNITS, matches_published_size
from vit_jax.step import abstract_params

# The variant of each released name.
VARIANTS = {
  'ViT-B_8': 'B/8', 'ViT-B_16': 'B/16', 'ViT-B_32': 'B/32', 'ViT-L_16': 'L/16', 'ViT-L_32': 'L/32',
  'ViT-H_14': 'H/14',
  'ViT-S_16': 'S/16', 'R26+ViT-B_32': 'R26+B/32', 'R50+ViT-B_16': 'R50+B/16',
  'R50+ViT-L_32': 'R50+L/32',
  'Ti_16': 'Ti/16', 'S_16': 'S/16', 'S_32': 'S/32', 'B_16': 'B/16', 'B_32': 'B/32', 'L_16': 'L/16',
  'R_Ti_16': 'R+Ti/16',
  'R26_S_32': 'R26+S/32', 'R50_L_32': 'R50+L/32',
}  # fmt: skip
SIZED = [name for name in released_checkpoints() if find_checkpoint(name).size]


@pytest.mark.parametrize('name', SIZED)
def test_a_published_file_size_equals_that_of_our_model(name):
  row = find_checkpoint(name)
  variant = VARIANTS[name.rpartition('/')[2].removesuffix('-224').partition('-i21k')[0]]
  model = build_vit(
    ModelConfig(variant=variant, hidden_head=name.startswith('imagenet21k/')), row.classes
  )
  stride = model.shape.stride[0]
  params = abstract_params(model, (row.pixels // stride * stride,) * 2)
  count = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  count *= 3 if name == 'sam/ViT-S_16' else 1  # The file also contains Adam's two moments.
  number, unit = row.size.split()
  rounded = 0.5 * 10 ** -len(number.partition('.')[2]) * SIZE_UNITS[unit]
  slack = 0.25 * 2**20 + rounded  # Zip headers, and the rounding of the published size.
  assert abs(float(number) * SIZE_UNITS[unit] - count) <= slack


def test_every_row_is_complete_and_consistent():
  assert len(released_checkpoints()) == len(set(released_checkpoints())) == 108
  for name in released_checkpoints():
    row = find_checkpoint(name)
    assert row.name == name
    assert row.url.startswith('https://storage.googleapis.com/')
    assert row.url.endswith('.npz')
    assert '+' not in row.url  # A server would decode it to a space.
    assert row.labels == {None: '', 1000: 'imagenet1k', 21843: 'imagenet21k'}[row.classes]
    assert (row.accuracy is None) == (not row.accuracy_from)
    assert row.accuracy is None or 70 < row.accuracy < 90


def test_every_published_file_is_listed_once():
  folders = collections.Counter(name.rpartition('/')[0] for name in released_checkpoints())
  assert folders == {
    'imagenet21k': 9, 'imagenet21k+imagenet2012': 8, 'sam': 5, 'augreg': 2 * 10, 'big_vision': 3,
    'big_vision/flexivit': 17,
    'big_vision/siglip': 9, 'big_vision/siglip2': 15, 'bit_models': 18, 'bit_models/distill': 4,
  }  # fmt: skip
  assert len(SIZED) == 9 + 8 + 5 + 9
  for name in released_checkpoints():
    assert find_checkpoint(name).url.replace('%2B', '+').endswith(f'{name}.npz')


def test_each_recommended_augreg_file_is_listed_pre_trained_and_fine_tuned():
  tuned = [name for name in released_checkpoints() if '--imagenet2012' in name]
  assert len(tuned) == 10
  for name in tuned:
    before, _, after = name.partition('--imagenet2012-steps_20k-lr_')
    assert find_checkpoint(before).labels == 'imagenet21k'
    assert float(after.split('-res_')[0]) in (0.01, 0.03)
    assert find_checkpoint(name).pixels == int(after.split('-res_')[1])
    assert find_checkpoint(name).accuracy


def test_an_unknown_name_gives_none_and_similar_names_are_suggested():
  assert find_checkpoint('imagenet21k/ViT-B16') is None
  assert 'imagenet21k/ViT-B_16' in suggest_names('ViT-B16')
  assert suggest_names('sam/ViT-B_61').startswith(" Did you mean 'sam/ViT-B_16'")
  assert suggest_names('resnet50') == ''


COLUMNS = (
  'name', 'ds', 'final_val', 'filename',
  'adapt_ds', 'adapt_resolution', 'adapt_final_test', 'adapt_filename',
)  # fmt: skip
LINES = [
  ('B/16', 'i21k', 'nan', 'B_16-i21k-lost',
   'imagenet2012', '224.0', '', 'B_16-i21k-lost--imagenet2012-res_224'),
  ('B/16', 'i21k', '0.50', 'B_16-i21k-one',
   'imagenet2012', '224', '0.84', 'B_16-i21k-one--imagenet2012-res_224'),
  ('B/16', 'i21k', '', 'B_16-i21k-gone', '', '', '', ''),
  ('B/16', 'i21k', '0.55', 'B_16-i21k-two',
   'cifar100', '384', '0.93', 'B_16-i21k-two--cifar100-res_384'),
  ('B/16', 'i1k', '0.80', 'B_16-i1k-three',
   'imagenet2012', '384', '0.81', 'B_16-i1k-three--imagenet2012-res_384'),
  ('R26+S/32', 'i21k', '0.40', 'R26_S_32-i21k-four',
   'imagenet2012', '384', '0.83', 'R26_S_32-i21k-four--x'),
]  # fmt: skip


@pytest.fixture
def index(tmp_path, monkeypatch):
  """Replace gs://vit_models/augreg/index.csv, and return its path and the fetched URLs."""
  path, fetched = tmp_path / 'index.csv', []
  with path.open('w', newline='') as file:
    table = csv.writer(file)
    table.writerows([COLUMNS, *LINES])
  monkeypatch.setattr(catalogue, 'fetch', lambda url: fetched.append(url) or path)
  return path, fetched


@pytest.mark.parametrize('name', ['augreg/B_16', 'augreg/B/16'])
def test_an_augreg_model_name_means_its_best_imagenet21k_checkpoint(index, name):
  row = find_checkpoint(name)
  assert row.name == 'augreg/B_16-i21k-two'
  assert row.url == 'https://storage.googleapis.com/vit_models/augreg/B_16-i21k-two.npz'
  assert (row.labels, row.accuracy) == ('imagenet21k', None)
  assert index[1] == ['https://storage.googleapis.com/vit_models/augreg/index.csv']


def test_the_best_augreg_checkpoint_is_the_row_of_the_catalogue_if_listed(index):
  name = 'S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0'
  index[0].write_text(
    index[0].read_text(encoding='utf-8') + f'S/16,i21k,0.5,{name},,,,\n', encoding='utf-8'
  )
  assert find_checkpoint('augreg/S_16') is find_checkpoint(f'augreg/{name}')
  assert find_checkpoint('augreg/S_16').size == '115 MiB'


def test_a_hybrid_is_found_under_both_spellings(index):
  assert find_checkpoint('augreg/R26+S/32') == find_checkpoint('augreg/R26_S_32')
  assert find_checkpoint('augreg/R26_S_32').name == 'augreg/R26_S_32-i21k-four'


def test_every_file_of_augregs_list_is_found(index):
  row = find_checkpoint('augreg/B_16-i21k-one--imagenet2012-res_224')
  assert (row.pixels, row.labels, row.accuracy, row.accuracy_from) == (
    224,
    'imagenet1k',
    84.0,
    "augreg's index.csv",
  )
  row = find_checkpoint('augreg/B_16-i21k-two--cifar100-res_384.npz')
  assert (row.pixels, row.labels, row.accuracy) == (384, '', None)
  assert find_checkpoint('augreg/B_16-i1k-three').labels == 'imagenet1k'
  row = find_checkpoint('augreg/B_16-i21k-lost--imagenet2012-res_224')
  assert (row.pixels, row.accuracy, row.accuracy_from) == (224, None, '')
  assert find_checkpoint('augreg/nothing') is None


def test_other_names_do_not_download_augregs_list(index):
  find_checkpoint('imagenet21k/ViT-B_16')
  find_checkpoint('nonsense')
  assert index[1] == []


@pytest.mark.parametrize('column', COLUMNS)
def test_an_augreg_list_without_a_needed_column_raises(index, column):
  index[0].write_text(
    index[0]
    .read_text(encoding='utf-8')
    .replace(f'{column},', 'other,', 1)
    .replace(f',{column}\n', ',other\n', 1),
    encoding='utf-8',
  )
  with pytest.raises(UserError, match=column):
    find_checkpoint('augreg/B_16')


def test_a_local_file_is_recognized_by_name_and_size(tmp_path):
  path = tmp_path / 'ViT-B_16.npz'
  for size, name in (
    ('331.4 MiB', 'imagenet21k+imagenet2012/ViT-B_16'),
    ('393.69 MiB', 'imagenet21k/ViT-B_16'),
  ):
    with path.open('wb') as file:
      file.truncate(round(float(size.split()[0]) * 2**20))  # A sparse file.
    assert matches_published_size(path.stat().st_size, size)
    assert find_checkpoint_of_file(path).name == name
  path.write_bytes(b'')
  assert find_checkpoint_of_file(path) is None
  assert find_checkpoint_of_file(tmp_path / 'mine.npz') is None
