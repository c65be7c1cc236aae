"""VTAB-1k (arXiv 1910.04867): 19 tasks of 1,000 training images each, as sources `vtab:TASK`.

Each task reads a TFDS dataset. Its split `train` has 800 images and `val` has 200. The final
training uses 'train+val', and the reported accuracy is that on `test`. The choice of images and
the labels are those of the benchmark's own code (google-research/task_adaptation).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable

import numpy as np

from vit_jax.data.decode import BadImageError, decode_image
from vit_jax.data.tfds_source import (
  TfdsRecords,
  class_label_names,
  find_class_label,
  find_prepared_builder,
  is_tfds_dataset,
  open_array_record_info,
  select_feature,
  tfds_base_name,
)
from vit_jax.errors import UserError, did_you_mean

TfdsExample = dict[str, np.ndarray]  # Keys of nested features are joined: 'objects/type'.
KITTI_VEHICLES = (0, 1, 2)  # KITTI's Car, Van, Truck.
CLEVR_DISTANCES = (0, 8, 8.5, 9, 9.5, 10, 100)  # Thresholds on the depth in the rendered scene.
KITTI_DISTANCES = (-100, 8, 20, 999)  # Thresholds in meters.
NO_VEHICLE_DISTANCE = 1000.0  # Meters.


@dataclasses.dataclass(frozen=True, slots=True)
class LabelRule:
  """A label that is computed from an example."""

  compute: Callable[[TfdsExample], int]
  label_names: tuple[str, ...]


def count_clevr_objects(example: TfdsExample) -> int:
  """Return the class of a CLEVR scene by its number of objects: 0 for three, 7 for ten."""
  return len(example['objects/size']) - 3


def bin_closest_object(example: TfdsExample) -> int:
  """Return the bin of CLEVR_DISTANCES that holds the nearest object of a CLEVR scene."""
  depths = example['objects/pixel_coords'].reshape(-1, 3)[:, 2]
  return bin_by_thresholds(depths.min(), CLEVR_DISTANCES)


def bin_closest_vehicle(example: TfdsExample) -> int:
  """Return the bin of KITTI_DISTANCES that holds the nearest car, van or truck.

  The last class means that there is no vehicle.
  """
  z = example['objects/location'].reshape(-1, 3)[:, 2]
  vehicles = z[np.isin(example['objects/type'], KITTI_VEHICLES)]
  return bin_by_thresholds(min(vehicles, default=NO_VEHICLE_DISTANCE), KITTI_DISTANCES)


def bin_by_thresholds(value: float, thresholds: tuple[float, ...]) -> int:
  """Return the index of the last threshold that is below the value."""
  return int(np.flatnonzero(np.array(thresholds) < value)[-1])


def bin_label_feature(feature: str, values: int, bins: int) -> Callable[[TfdsExample], int]:
  """Return a function that puts a feature with `values` classes into equal bins."""
  return lambda example: int(example[feature].item() * bins // values)


def interval_names(thresholds: tuple[float, ...]) -> tuple[str, ...]:
  """Return the names of the bins between thresholds, such as '0 to 8'."""
  return tuple(f'{low:g} to {high:g}' for low, high in itertools.pairwise(thresholds))


def number_names(count: int) -> tuple[str, ...]:
  """Return the names '0', '1' and so on."""
  return tuple(map(str, range(count)))


# Labels that are not a feature of their dataset.
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
  """One of the 19 tasks."""

  title: str  # As in Table 9 of the paper.
  group: str
  dataset: str  # A TFDS name.
  label_feature: str  # A feature of the dataset, or a key of LABEL_RULES.
  train: str  # 800 images, in the syntax of `parse_subsplit`.
  val: str  # 200 other images.
  test: str  # The images of the reported accuracy.
  augmentations: str = 'crop flip'  # Those that keep the label, as in BiT (arXiv 1912.11370).

  @property
  def splits(self) -> dict[str, str]:
    """The images of each split, in the syntax of `parse_subsplit`."""
    return {'train': self.train, 'val': self.val, 'test': self.test}


NATURAL, SPECIALIZED, STRUCTURED = 'natural', 'specialized', 'structured'
NINETY_TEN_SPLITS = ('train[:800]', 'train[90%:][:200]', 'test')
ORIGINAL_SPLITS = ('train[:800]', 'validation[:200]', 'test')
PETS_SPLITS = ('train[:800]', 'train[80%:][:200]', 'test')
SIXTY_TWENTY_SPLITS = ('train[:800]', 'train[60%:][:200]', 'train[80%:]')
CLEVR_SPLITS = ('train[:800]', 'train[90%:][:200]', 'validation')
DSPRITES_SPLITS = ('train[:800]', 'train[80%:][:200]', 'train[90%:]')
SMALLNORB_SPLITS = ('train[:800]', 'test[:200]', 'test[50%:]')

# In the order of Table 9.
VTAB_TASKS = {
  'caltech101': VtabTask('Caltech101', NATURAL, 'caltech101', 'label', *NINETY_TEN_SPLITS),
  'cifar100': VtabTask('CIFAR-100', NATURAL, 'cifar100', 'label', *NINETY_TEN_SPLITS),
  'dtd': VtabTask('DTD', NATURAL, 'dtd', 'label', *ORIGINAL_SPLITS),
  'oxford_flowers102': VtabTask(
    'Flowers102', NATURAL, 'oxford_flowers102', 'label', *ORIGINAL_SPLITS
  ),
  'oxford_iiit_pet': VtabTask('Pets', NATURAL, 'oxford_iiit_pet', 'label', *PETS_SPLITS),
  'sun397': VtabTask('Sun397', NATURAL, 'sun397/tfds', 'label', *ORIGINAL_SPLITS),
  'svhn': VtabTask('SVHN', NATURAL, 'svhn_cropped', 'label', *NINETY_TEN_SPLITS),
  'patch_camelyon': VtabTask('Camelyon', SPECIALIZED, 'patch_camelyon', 'label', *ORIGINAL_SPLITS),
  'eurosat': VtabTask('EuroSAT', SPECIALIZED, 'eurosat/rgb', 'label', *SIXTY_TWENTY_SPLITS),
  'resisc45': VtabTask('Resisc45', SPECIALIZED, 'resisc45', 'label', *SIXTY_TWENTY_SPLITS),
  'diabetic_retinopathy': VtabTask(
    'Retinopathy',
    SPECIALIZED,
    'diabetic_retinopathy_detection/btgraham-300',
    'label',
    *ORIGINAL_SPLITS,
  ),
  'clevr_count': VtabTask('Clevr-Count', STRUCTURED, 'clevr', 'count_all', *CLEVR_SPLITS, 'flip'),
  'clevr_distance': VtabTask(
    'Clevr-Dist', STRUCTURED, 'clevr', 'closest_object_distance', *CLEVR_SPLITS, 'flip'
  ),
  'dmlab': VtabTask('DMLab', STRUCTURED, 'dmlab', 'label', *ORIGINAL_SPLITS, 'flip'),
  'dsprites_location': VtabTask(
    'dSpr-Loc', STRUCTURED, 'dsprites', 'x_position_16', *DSPRITES_SPLITS, ''
  ),
  'dsprites_orientation': VtabTask(
    'dSpr-Ori', STRUCTURED, 'dsprites', 'orientation_16', *DSPRITES_SPLITS, 'crop'
  ),
  'kitti_distance': VtabTask(
    'KITTI-Dist', STRUCTURED, 'kitti', 'closest_vehicle_distance', *ORIGINAL_SPLITS, 'flip'
  ),
  'smallnorb_azimuth': VtabTask(
    'sNORB-Azim', STRUCTURED, 'smallnorb', 'label_azimuth', *SMALLNORB_SPLITS, 'crop'
  ),
  'smallnorb_elevation': VtabTask(
    'sNORB-Elev', STRUCTURED, 'smallnorb', 'label_elevation', *SMALLNORB_SPLITS
  ),
}

# Datasets that TFDS cannot download, and where it expects their files.
MANUAL_DOWNLOADS = {
  'resisc45': (
    'unpack NWPU-RESISC45.rar (arXiv 1703.00121; OneDrive, '
    '1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlzp_IXjs) to downloads/manual/NWPU-RESISC45'
  ),
  'diabetic_retinopathy_detection': (
    'from kaggle.com/c/diabetic-retinopathy-detection unpack train.zip, test.zip and sample.zip to '
    'downloads/manual/train, …/test and …/sample, and put trainLabels.csv and sampleSubmission.csv '
    'into downloads/manual'
  ),
}


class VtabStore:
  """A task by name, as a store of sources.py."""

  splits = ('train', 'val', 'test')

  def __init__(self, name: str, *, dir: str = ''):
    if name not in VTAB_TASKS:
      raise UserError(f'VTAB has no task {name!r}.{did_you_mean(name, VTAB_TASKS)}')
    self.title, self._name = f'vtab:{name}', name
    task = VTAB_TASKS[name]
    check_manual_download(task.dataset, dir)
    info = open_array_record_info(task.dataset, dir)
    self._records = TfdsRecords(task.dataset, info)
    if task.label_feature in LABEL_RULES:
      self.label_names = LABEL_RULES[task.label_feature].label_names
    else:
      feature = select_feature(info, (task.label_feature,), find_class_label, 'class label')
      self.label_names = class_label_names(find_class_label(info.features[feature]))
    sizes = {split: sum(lengths) for split, lengths in self._records.shard_lengths.items()}
    self._spans = {
      split: parse_subsplit(spec, sizes, self.title) for split, spec in task.splits.items()
    }

  def shard_lengths(self, split: str) -> list[int]:
    """Return the number of examples of each shard of a split."""
    _, start, stop = self._spans[split]
    return [stop - start]

  def max_labels(self, split: str) -> int:
    """Return the largest number of labels of an example."""
    return 1

  def read_example(self, split: str, i: int) -> tuple[bytes | np.ndarray, tuple[int, ...], str]:
    """Return (image, labels, name) of example `i` of a split."""
    dataset_split, start, _ = self._spans[split]
    name = f'{self.title} {split} #{i}'
    image, features = self._records.read_example(dataset_split, start + i, name)
    label = compute_label(VTAB_TASKS[self._name], features)
    if not 0 <= label < len(self.label_names):
      problem = f'label {label} is out of range for {len(self.label_names)} classes'
      raise BadImageError(name, problem)
    return scale_dsprites_pixels(self._name, image, name), (label,), name

  def index_bytes(self, split: str) -> bytes:
    """Return bytes that change when the list of examples of a split changes."""
    span = self._spans[split]
    return self._records.index_bytes(span[0]) + repr((self._name, span)).encode()


def compute_label(task: VtabTask, features) -> int:
  """Return the label of a stored example, given as {feature: tf.train.Feature}."""
  if task.label_feature not in LABEL_RULES:
    return features[task.label_feature].int64_list.value[0]
  values = lambda feature: getattr(feature, feature.WhichOneof('kind') or 'int64_list').value
  example = {name: np.array(values(features[name])) for name in features if name != 'image'}
  return LABEL_RULES[task.label_feature].compute(example)


def scale_dsprites_pixels(task: str, data: bytes, name: str) -> bytes | np.ndarray:
  """Return the image, with the pixels 0 and 1 of dSprites scaled to 0 and 255."""
  if not task.startswith('dsprites'):
    return data
  return decode_image(data, name=name, max_pixels=100_000_000) * 255


def check_manual_download(name: str, dir: str):
  """Check that a dataset is on disk if TFDS cannot download it.

  Raises UserError with what to download, and where to put it.
  """
  manual = MANUAL_DOWNLOADS.get(tfds_base_name(name))
  if manual and is_tfds_dataset(name) and not find_prepared_builder(name, dir):
    raise UserError(
      f'tfds:{name} is missing and must be downloaded by hand. In the directory of TFDS datasets: '
      f'{manual}. Then run: python -m vit_jax data prepare {name}'
    )


def parse_subsplit(spec: str, sizes: dict[str, int], title: str) -> tuple[str, int, int]:
  """Parse 'train[90%:][:200]' into ('train', start, stop).

  Each pair of brackets selects a part of what the previous pair selected, which TFDS's own syntax
  cannot express. Percentages are rounded down, as in the benchmark.

  Raises UserError if the split does not exist or has too few examples.
  """
  split, *cuts = re.split(r'\[', spec.replace(']', ''))
  if split not in sizes:
    raise UserError(f'{title} needs the split {split!r}, but its dataset has {", ".join(sizes)}')
  start, stop = 0, sizes[split]
  for cut in cuts:
    low, high = (parse_bound(text, stop - start) for text in cut.split(':'))
    start, stop = start + (low or 0), stop if high is None else start + high
  if not start < stop <= sizes[split]:
    raise UserError(
      f'{title} needs {spec} of its dataset, but the split {split!r} has only {sizes[split]:,} '
      'examples'
    )
  return split, start, stop


def parse_bound(text: str, examples: int) -> int | None:
  """Parse '90%' of `examples`, or '200'. Returns None for ''."""
  if not text:
    return None
  return examples * int(text[:-1]) // 100 if text.endswith('%') else int(text)
