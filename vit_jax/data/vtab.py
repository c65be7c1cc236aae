"""VTAB-1k (arXiv 1910.04867): 19 tasks of 1,000 images to learn from, each from a TFDS data set, as `vtab:TASK`.

`train` has 800 images and `val` 200; 'train+val' is what the last training takes, `test` what is reported. Which images and
what labels these are is as in the benchmark's own code (google-research/task_adaptation).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable

import numpy as np

from vit_jax.data.images import BadImageError, decode_image
from vit_jax.data.tfds_source import (
  TfdsRecords,
  class_label_names,
  find_class_label,
  find_prepared_builder,
  is_tfds_dataset,
  open_array_record_info,
  select_feature,
)
from vit_jax.errors import UserError, did_you_mean

TfdsExample = dict[
  str, np.ndarray
]  # A TFDS example; what is in a list of objects has both names, 'objects/type'.
KITTI_VEHICLES = (0, 1, 2)  # KITTI's Car, Van, Truck.
CLEVR_DISTANCES = (
  0,
  8,
  8.5,
  9,
  9.5,
  10,
  100,
)  # Thresholds; the depth of an object in the rendered scene.
KITTI_DISTANCES = (-100, 8, 20, 999)  # Metres.
NO_VEHICLE_DISTANCE = 1000.0  # Metres.


@dataclasses.dataclass(frozen=True, slots=True)
class LabelRule:
  """What the label of an example is."""

  label: Callable[[TfdsExample], int]
  names: tuple[str, ...]


def count_clevr_objects(example: TfdsExample) -> int:
  """CLEVR: three objects are class 0, ten are class 7."""
  return len(example['objects/size']) - 3


def bin_closest_object(example: TfdsExample) -> int:
  """CLEVR: how far the nearest object is, in steps of CLEVR_DISTANCES."""
  return bin_by_thresholds(
    example['objects/pixel_coords'].reshape(-1, 3)[:, 2].min(), CLEVR_DISTANCES
  )


def bin_closest_vehicle(example: TfdsExample) -> int:
  """KITTI: how far the nearest car, van or truck is, in steps of KITTI_DISTANCES; the last is none at all."""
  z = example['objects/location'].reshape(-1, 3)[:, 2]
  return bin_by_thresholds(
    min(z[np.isin(example['objects/type'], KITTI_VEHICLES)], default=NO_VEHICLE_DISTANCE),
    KITTI_DISTANCES,
  )


def bin_by_thresholds(value: float, thresholds: tuple[float, ...]) -> int:
  """The number of the last threshold that is below the value."""
  return int(np.flatnonzero(np.array(thresholds) < value)[-1])


def bin_label_feature(feature: str, values: int, bins: int) -> Callable[[TfdsExample], int]:
  """A class of `values` in as many equal bins: of 40 orientations, 16."""
  return lambda example: int(example[feature].item() * bins // values)


interval_names = lambda thresholds: tuple(
  f'{low:g} to {high:g}' for low, high in itertools.pairwise(thresholds)
)
number_names = lambda count: tuple(map(str, range(count)))

# The labels that are no feature of their data set.
LABEL_RULES = {
  'count_all': LabelRule(count_clevr_objects, tuple(map(str, range(3, 11)))),
  'closest_object_distance': LabelRule(bin_closest_object, interval_names(CLEVR_DISTANCES)),
  'closest_vehicle_distance': LabelRule(
    bin_closest_vehicle, (*interval_names(KITTI_DISTANCES), 'none')
  ),
  'x_position_16': LabelRule(bin_label_feature('label_x_position', 32, 16), number_names(16)),
  'orientation_16': LabelRule(bin_label_feature('label_orientation', 40, 16), number_names(16)),
}


@dataclasses.dataclass(frozen=True, slots=True)
class VtabTask:
  """One of the 19."""

  title: str  # In the paper's Table 9.
  group: str
  tfds: str
  label: str  # A feature of the data set, or a name in RULES.
  train: str  # 800 images …
  val: str  # … 200 others …
  test: str  # … and those that count.
  augment: str = 'crop flip'  # BiT's: which of them leave the label as it is (arXiv 1912.11370).


SPECIALIZED = 'specialized'
NINETY_TEN_SPLITS = ('train[:800]', 'train[90%:][:200]', 'test')
ORIGINAL_SPLITS = ('train[:800]', 'validation[:200]', 'test')
SIXTY_TWENTY_SPLITS = ('train[:800]', 'train[60%:][:200]', 'train[80%:]')
CLEVR_SPLITS = ('train[:800]', 'train[90%:][:200]', 'validation')
DSPRITES_SPLITS = ('train[:800]', 'train[80%:][:200]', 'train[90%:]')
SMALLNORB_SPLITS = ('train[:800]', 'test[:200]', 'test[50%:]')

# In Table 9's order.
VTAB_TASKS = {
  'caltech101':           VtabTask('Caltech101', 'natural', 'caltech101', 'label', *NINETY_TEN_SPLITS),
  'cifar100':             VtabTask('CIFAR-100', 'natural', 'cifar100', 'label', *NINETY_TEN_SPLITS),
  'dtd':                  VtabTask('DTD', 'natural', 'dtd', 'label', *ORIGINAL_SPLITS),
  'oxford_flowers102':    VtabTask('Flowers102', 'natural', 'oxford_flowers102', 'label', *ORIGINAL_SPLITS),
  'oxford_iiit_pet':      VtabTask('Pets', 'natural', 'oxford_iiit_pet', 'label', 'train[:800]', 'train[80%:][:200]', 'test'),
  'sun397':               VtabTask('Sun397', 'natural', 'sun397/tfds', 'label', *ORIGINAL_SPLITS),
  'svhn':                 VtabTask('SVHN', 'natural', 'svhn_cropped', 'label', *NINETY_TEN_SPLITS),
  'patch_camelyon':       VtabTask('Camelyon', SPECIALIZED, 'patch_camelyon', 'label', *ORIGINAL_SPLITS),
  'eurosat':              VtabTask('EuroSAT', SPECIALIZED, 'eurosat/rgb', 'label', *SIXTY_TWENTY_SPLITS),
  'resisc45':             VtabTask('Resisc45', SPECIALIZED, 'resisc45', 'label', *SIXTY_TWENTY_SPLITS),
  'diabetic_retinopathy': VtabTask('Retinopathy', SPECIALIZED, 'diabetic_retinopathy_detection/btgraham-300', 'label', *ORIGINAL_SPLITS),
  'clevr_count':          VtabTask('Clevr-Count', 'structured', 'clevr', 'count_all', *CLEVR_SPLITS, 'flip'),
  'clevr_distance':       VtabTask('Clevr-Dist', 'structured', 'clevr', 'closest_object_distance', *CLEVR_SPLITS, 'flip'),
  'dmlab':                VtabTask('DMLab', 'structured', 'dmlab', 'label', *ORIGINAL_SPLITS, 'flip'),
  'dsprites_location':    VtabTask('dSpr-Loc', 'structured', 'dsprites', 'x_position_16', *DSPRITES_SPLITS, ''),
  'dsprites_orientation': VtabTask('dSpr-Ori', 'structured', 'dsprites', 'orientation_16', *DSPRITES_SPLITS, 'crop'),
  'kitti_distance':       VtabTask('KITTI-Dist', 'structured', 'kitti', 'closest_vehicle_distance', *ORIGINAL_SPLITS, 'flip'),
  'smallnorb_azimuth':    VtabTask('sNORB-Azim', 'structured', 'smallnorb', 'label_azimuth', *SMALLNORB_SPLITS, 'crop'),
  'smallnorb_elevation':  VtabTask('sNORB-Elev', 'structured', 'smallnorb', 'label_elevation', *SMALLNORB_SPLITS),
}  # fmt: skip

# What TFDS cannot fetch by itself, and where it looks for it under its directory of downloads.
MANUAL_DOWNLOADS = {
  'resisc45': 'unpack NWPU-RESISC45.rar (arXiv 1703.00121; OneDrive, 1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlzp_IXjs) to '
  'downloads/manual/NWPU-RESISC45',
  'diabetic_retinopathy_detection': 'from kaggle.com/c/diabetic-retinopathy-detection unpack train.zip, test.zip and '
  'sample.zip to downloads/manual/train, …/test and …/sample, and trainLabels.csv and sampleSubmission.csv beside them',
}


class VtabStore:
  """A task by its name, as a store of sources.py."""

  splits = ('train', 'val', 'test')

  def __init__(self, name: str, *, dir: str = ''):
    if name not in VTAB_TASKS:
      raise UserError(f'VTAB has no task {name!r}.{did_you_mean(name, VTAB_TASKS)}')
    self.title, self._name = f'vtab:{name}', name
    task = VTAB_TASKS[name]
    check_manual_download(task.tfds, dir)
    info = open_array_record_info(task.tfds, dir)
    self._records = TfdsRecords(task.tfds, info)
    if task.label in LABEL_RULES:
      self.label_names = LABEL_RULES[task.label].names
    else:
      self.label_names = class_label_names(
        find_class_label(
          info.features[select_feature(info, (task.label,), find_class_label, 'class label')]
        )
      )
    sizes = {split: sum(each) for split, each in self._records.shards.items()}
    self._spans = {
      split: parse_subsplit(getattr(task, split), sizes, self.title) for split in self.splits
    }

  def shards(self, split: str) -> list[int]:
    _, start, stop = self._spans[split]
    return [stop - start]

  def most_labels(self, split: str) -> int:
    return 1

  def read(self, split: str, i: int):
    theirs, start, _ = self._spans[split]
    name = f'{self.title} {split} #{i}'
    image, features = self._records.read(theirs, start + i, name)
    label = compute_label(VTAB_TASKS[self._name], features)
    if not 0 <= label < len(self.label_names):
      raise BadImageError(name, f'its label {label} is none of {len(self.label_names)} classes')
    return scale_dsprites_pixels(self._name, image, name), (label,), name

  def listing(self, split: str) -> bytes:
    return (
      self._records.listing(self._spans[split][0]) + repr((self._name, self._spans[split])).encode()
    )


def compute_label(task: VtabTask, features) -> int:
  """Of a stored example."""
  if task.label not in LABEL_RULES:
    return features[task.label].int64_list.value[0]
  values = lambda feature: getattr(feature, feature.WhichOneof('kind') or 'int64_list').value
  return LABEL_RULES[task.label].label(
    {name: np.array(values(features[name])) for name in features if name != 'image'}
  )


def scale_dsprites_pixels(name: str, data: bytes, title: str) -> bytes | np.ndarray:
  """The image as its task wants it: dSprites has pixels of 0 and 1."""
  return (
    decode_image(data, name=title, max_pixels=100_000_000) * 255
    if name.startswith('dsprites')
    else data
  )


def check_manual_download(name: str, dir: str):
  """UserError that says what to fetch by hand, for a data set that is not here and that TFDS cannot fetch."""
  base = name.partition('/')[0]
  if base in MANUAL_DOWNLOADS and is_tfds_dataset(name) and not find_prepared_builder(name, dir):
    raise UserError(
      f'tfds:{name} is not here, and has to be fetched by hand: {MANUAL_DOWNLOADS[base]} in the directory of TFDS data; '
      f'then run: python -m vit_jax data prepare {name}'
    )


def parse_subsplit(spec: str, sizes: dict[str, int], title: str) -> tuple[str, int, int]:
  """'train[90%:][:200]' -> ('train', start, stop): each pair of brackets is a part of what the ones before it left.

  A share is rounded down, as the benchmark does. UserError where there are not so many examples.
  """
  split, *cuts = re.split(r'\[', spec.replace(']', ''))
  if split not in sizes:
    raise UserError(
      f'{title} wants the split {split!r} of its data set, which has {", ".join(sizes)}'
    )
  start, stop = 0, sizes[split]
  for cut in cuts:
    low, high = (parse_bound(text, stop - start) for text in cut.split(':'))
    start, stop = start + (low or 0), stop if high is None else start + high
  if not start < stop <= sizes[split]:
    raise UserError(
      f'{title} wants {spec} of its data set, whose split {split!r} has {sizes[split]:,} examples'
    )
  return split, start, stop


def parse_bound(text: str, examples: int) -> int | None:
  """'90%' or '200' of so many examples; None for ''."""
  return examples * int(text[:-1]) // 100 if text.endswith('%') else int(text) if text else None
