"""Images whose labels nobody asks for: any source, with splits and folders that have none besides.

images:PATH    every image file below a folder, in one split, 'train'
tfds:NAME      a TFDS data set, with the splits that are without labels
"""

import os
from pathlib import Path

import numpy as np

from vit_jax.data.folder import IMAGE_EXTENSIONS, read_image_file, resolve_existing_path
from vit_jax.data.sources import STORES, Source, open_source
from vit_jax.data.tfds_source import TfdsRecords, open_array_record_info
from vit_jax.errors import UserError


class UnlabelledFolderStore:
  """Every image file below a folder, sorted by its path. Hidden files and folders are passed over."""

  label_names = ()
  splits = ('train',)

  def __init__(self, path: str, *, dir: str = ''):
    self._root, self.title = resolve_existing_path(path), f'images:{path}'
    if not self._root.is_dir():
      raise UserError(f'{path} is a file, not a folder of images')
    self._paths = np.array(sorted(self._found()), 'S')
    if not len(self._paths):
      raise UserError(
        f'{path} holds no images ({" ".join(IMAGE_EXTENSIONS)}), nor do the folders below it'
      )

  def shards(self, split: str) -> list[int]:
    return [len(self._paths)]

  def most_labels(self, split: str) -> int:
    return 1

  def listing(self, split: str) -> bytes:
    return self._paths.tobytes()

  def read(self, split: str, i: int):
    path = self._root / os.fsdecode(self._paths[i])
    return read_image_file(path), (), str(path)

  def _found(self) -> list[bytes]:
    """Paths under the root."""
    out = []
    for folder, folders, files in os.walk(self._root):
      folders[:] = [name for name in folders if name[0] != '.']
      named = [
        Path(folder, name)
        for name in files
        if name.lower().endswith(IMAGE_EXTENSIONS) and name[0] != '.'
      ]
      out += [os.fsencode(path.relative_to(self._root)) for path in named]
    return out


class UnlabelledTfdsStore:
  """A TFDS data set, labels or none."""

  label_names = ()

  def __init__(self, name: str, *, dir: str = ''):
    self.title = f'tfds:{name}'
    self._records = TfdsRecords(name, open_array_record_info(name, dir))
    self.splits = tuple(split for split, shards in self._records.shards.items() if shards)

  def shards(self, split: str) -> list[int]:
    return self._records.shards[split]

  def most_labels(self, split: str) -> int:
    return 1

  def listing(self, split: str) -> bytes:
    return self._records.listing(split)

  def read(self, split: str, i: int):
    name = f'{self.title} {split} #{i}'
    return self._records.read(split, i, name)[0], (), name


def open_unlabelled(name: str, split: str, *, dir: str = '') -> Source:
  """As `open_source`, of examples whose labels, if they have any, are nobody's business."""
  return open_source(
    name,
    split,
    dir=dir,
    stores=STORES | {'images': UnlabelledFolderStore, 'tfds': UnlabelledTfdsStore},
  )
