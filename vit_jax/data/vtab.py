"""VTAB-1k (arXiv 1910.04867): 19 tasks of 1,000 images to learn from, each from a TFDS data set, as `vtab:TASK`.

`train` has 800 images and `val` 200; 'train+val' is what the last training takes, `test` what is reported. Which images and
what labels these are is as in the benchmark's own code (google-research/task_adaptation).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable

import numpy as np

from vit_jax.data.images import BadImage, decode
from vit_jax.data.tfds_source import Records, class_label, known, names_of, only, prepared, random_access
from vit_jax.errors import UserError, did_you_mean

Example = dict[str, np.ndarray]  # A TFDS example; what is in a list of objects has both names, 'objects/type'.
VEHICLES = (0, 1, 2)  # KITTI's Car, Van, Truck.
CLEVR_DISTANCES = (0, 8, 8.5, 9, 9.5, 10, 100)  # Thresholds; the depth of an object in the rendered scene.
KITTI_DISTANCES = (-100, 8, 20, 999)  # Metres.
NO_VEHICLE = 1000.0  # Metres.


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
  """What the label of an example is."""

  label: Callable[[Example], int]
  names: tuple[str, ...]


def count_objects(example: Example) -> int:
  """CLEVR: three objects are class 0, ten are class 7."""
  return len(example['objects/size']) - 3


def closest_object(example: Example) -> int:
  """CLEVR: how far the nearest object is, in steps of CLEVR_DISTANCES."""
  return step(example['objects/pixel_coords'].reshape(-1, 3)[:, 2].min(), CLEVR_DISTANCES)


def closest_vehicle(example: Example) -> int:
  """KITTI: how far the nearest car, van or truck is, in steps of KITTI_DISTANCES; the last is none at all."""
  z = example['objects/location'].reshape(-1, 3)[:, 2]
  return step(min(z[np.isin(example['objects/type'], VEHICLES)], default=NO_VEHICLE), KITTI_DISTANCES)


def step(value: float, thresholds: tuple[float, ...]) -> int:
  """The number of the last threshold that is below the value."""
  return int(np.flatnonzero(np.array(thresholds) < value)[-1])


def binned(feature: str, values: int, bins: int) -> Callable[[Example], int]:
  """A class of `values` in as many equal bins: of 40 orientations, 16."""
  return lambda example: int(example[feature].item() * bins // values)


between = lambda thresholds: tuple(f'{low:g} to {high:g}' for low, high in itertools.pairwise(thresholds))
numbered = lambda count: tuple(map(str, range(count)))

# The labels that are no feature of their data set.
RULES = {
  'count_all': Rule(count_objects, tuple(map(str, range(3, 11)))),
  'closest_object_distance': Rule(closest_object, between(CLEVR_DISTANCES)),
  'closest_vehicle_distance': Rule(closest_vehicle, (*between(KITTI_DISTANCES), 'none')),
  'x_position_16': Rule(binned('label_x_position', 32, 16), numbered(16)),
  'orientation_16': Rule(binned('label_orientation', 40, 16), numbered(16)),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
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
NINETY = ('train[:800]', 'train[90%:][:200]', 'test')
OWN = ('train[:800]', 'validation[:200]', 'test')
FIFTHS = ('train[:800]', 'train[60%:][:200]', 'train[80%:]')
CLEVR = ('train[:800]', 'train[90%:][:200]', 'validation')
SPRITES = ('train[:800]', 'train[80%:][:200]', 'train[90%:]')
NORB = ('train[:800]', 'test[:200]', 'test[50%:]')

# In Table 9's order.
TASKS = {
  'caltech101':           Task('Caltech101', 'natural', 'caltech101', 'label', *NINETY),
  'cifar100':             Task('CIFAR-100', 'natural', 'cifar100', 'label', *NINETY),
  'dtd':                  Task('DTD', 'natural', 'dtd', 'label', *OWN),
  'oxford_flowers102':    Task('Flowers102', 'natural', 'oxford_flowers102', 'label', *OWN),
  'oxford_iiit_pet':      Task('Pets', 'natural', 'oxford_iiit_pet', 'label', 'train[:800]', 'train[80%:][:200]', 'test'),
  'sun397':               Task('Sun397', 'natural', 'sun397/tfds', 'label', *OWN),
  'svhn':                 Task('SVHN', 'natural', 'svhn_cropped', 'label', *NINETY),
  'patch_camelyon':       Task('Camelyon', SPECIALIZED, 'patch_camelyon', 'label', *OWN),
  'eurosat':              Task('EuroSAT', SPECIALIZED, 'eurosat/rgb', 'label', *FIFTHS),
  'resisc45':             Task('Resisc45', SPECIALIZED, 'resisc45', 'label', *FIFTHS),
  'diabetic_retinopathy': Task('Retinopathy', SPECIALIZED, 'diabetic_retinopathy_detection/btgraham-300', 'label', *OWN),
  'clevr_count':          Task('Clevr-Count', 'structured', 'clevr', 'count_all', *CLEVR, 'flip'),
  'clevr_distance':       Task('Clevr-Dist', 'structured', 'clevr', 'closest_object_distance', *CLEVR, 'flip'),
  'dmlab':                Task('DMLab', 'structured', 'dmlab', 'label', *OWN, 'flip'),
  'dsprites_location':    Task('dSpr-Loc', 'structured', 'dsprites', 'x_position_16', *SPRITES, ''),
  'dsprites_orientation': Task('dSpr-Ori', 'structured', 'dsprites', 'orientation_16', *SPRITES, 'crop'),
  'kitti_distance':       Task('KITTI-Dist', 'structured', 'kitti', 'closest_vehicle_distance', *OWN, 'flip'),
  'smallnorb_azimuth':    Task('sNORB-Azim', 'structured', 'smallnorb', 'label_azimuth', *NORB, 'crop'),
  'smallnorb_elevation':  Task('sNORB-Elev', 'structured', 'smallnorb', 'label_elevation', *NORB),
}  # fmt: skip

# What TFDS cannot fetch by itself, and where it looks for it under its directory of downloads.
MANUAL = {
  'resisc45': 'unpack NWPU-RESISC45.rar (arXiv 1703.00121; OneDrive, 1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlzp_IXjs) to '
  'downloads/manual/NWPU-RESISC45',
  'diabetic_retinopathy_detection': 'from kaggle.com/c/diabetic-retinopathy-detection unpack train.zip, test.zip and '
  'sample.zip to downloads/manual/train, …/test and …/sample, and trainLabels.csv and sampleSubmission.csv beside them',
}


class Vtab:
  """A task by its name, as a store of sources.py."""

  splits = ('train', 'val', 'test')

  def __init__(self, name: str, *, dir: str = ''):
    if name not in TASKS:
      raise UserError(f'VTAB has no task {name!r}.{did_you_mean(name, TASKS)}')
    self.title, self._name = f'vtab:{name}', name
    task = TASKS[name]
    refuse_missing(task.tfds, dir)
    info = random_access(task.tfds, dir)
    self._records = Records(task.tfds, info)
    if task.label in RULES:
      self.label_names = RULES[task.label].names
    else:
      self.label_names = names_of(class_label(info.features[only(info, (task.label,), class_label, 'class label')]))
    sizes = {split: sum(each) for split, each in self._records.shards.items()}
    self._spans = {split: span(getattr(task, split), sizes, self.title) for split in self.splits}

  def shards(self, split: str) -> list[int]:
    _, start, stop = self._spans[split]
    return [stop - start]

  def most_labels(self, split: str) -> int:
    return 1

  def read(self, split: str, i: int):
    theirs, start, _ = self._spans[split]
    name = f'{self.title} {split} #{i}'
    image, features = self._records.read(theirs, start + i, name)
    label = label_of(TASKS[self._name], features)
    if not 0 <= label < len(self.label_names):
      raise BadImage(name, f'its label {label} is none of {len(self.label_names)} classes')
    return pixels(self._name, image, name), (label,), name

  def listing(self, split: str) -> bytes:
    return self._records.listing(self._spans[split][0]) + repr((self._name, self._spans[split])).encode()


def label_of(task: Task, features) -> int:
  """Of a stored example."""
  if task.label not in RULES:
    return features[task.label].int64_list.value[0]
  values = lambda feature: getattr(feature, feature.WhichOneof('kind') or 'int64_list').value
  return RULES[task.label].label({name: np.array(values(features[name])) for name in features if name != 'image'})


def pixels(name: str, data: bytes, title: str) -> bytes | np.ndarray:
  """The image as its task wants it: dSprites has pixels of 0 and 1."""
  return decode(data, name=title, max_pixels=100_000_000) * 255 if name.startswith('dsprites') else data


def refuse_missing(name: str, dir: str):
  """UserError that says what to fetch by hand, for a data set that is not here and that TFDS cannot fetch."""
  base = name.partition('/')[0]
  if base in MANUAL and known(name) and not prepared(name, dir):
    raise UserError(
      f'tfds:{name} is not here, and has to be fetched by hand: {MANUAL[base]} in the directory of TFDS data; '
      f'then run: python -m vit_jax data prepare {name}'
    )


def span(spec: str, sizes: dict[str, int], title: str) -> tuple[str, int, int]:
  """'train[90%:][:200]' -> ('train', start, stop): each pair of brackets is a part of what the ones before it left.

  A share is rounded down, as the benchmark does. UserError where there are not so many examples.
  """
  split, *cuts = re.split(r'\[', spec.replace(']', ''))
  if split not in sizes:
    raise UserError(f'{title} wants the split {split!r} of its data set, which has {", ".join(sizes)}')
  start, stop = 0, sizes[split]
  for cut in cuts:
    low, high = (place(text, stop - start) for text in cut.split(':'))
    start, stop = start + (low or 0), stop if high is None else start + high
  if not start < stop <= sizes[split]:
    raise UserError(f'{title} wants {spec} of its data set, whose split {split!r} has {sizes[split]:,} examples')
  return split, start, stop


def place(text: str, examples: int) -> int | None:
  """'90%' or '200' of so many examples; None for ''."""
  return examples * int(text[:-1]) // 100 if text.endswith('%') else int(text) if text else None
