"""Which of ImageNet's classes a class of ObjectNet is, read from the files in the directory `mappings` of its own archive.

The archive is at objectnet.dev, under a licence of its own, so nothing of it is here.
"""

import json
from pathlib import Path

from vit_jax.errors import UserError

OBJECTNET_BORDER = 2  # Pixels: every image has a red frame, to be cut off before anything else.

# What each file holds.
_FOLDER_FILE = 'folder_to_objectnet_label.json'  # {a folder of images: the name of its class}
_OVERLAP_FILE = (
  'objectnet_to_imagenet_1k.json'  # {a class that both have: 'name; name' of ImageNet's classes}
)
_IMAGENET_NAMES_FILE = 'imagenet_to_label_2012_v2'  # The names of ImageNet's classes, one a line, in the order of ILSVRC's numbers.
_CLASS_ORDER_FILE = 'pytorch_to_imagenet_2012_id.json'  # {the number of a class in the order of synsets: its ILSVRC number}


def read_objectnet_classes(folders: tuple[str, ...], mappings: Path) -> tuple[tuple[int, ...], ...]:
  """For each folder of images, the numbers of ImageNet's classes that are right for it: none where ImageNet lacks it.

  UserError where the files are not there, or do not fit the folders.
  """
  classes, overlap = (
    json.loads(_read_mapping_file(mappings, name)) for name in (_FOLDER_FILE, _OVERLAP_FILE)
  )
  line = {
    name.strip(): i
    for i, name in enumerate(_read_mapping_file(mappings, _IMAGENET_NAMES_FILE).splitlines())
  }
  number = {
    ilsvrc: int(order)
    for order, ilsvrc in json.loads(_read_mapping_file(mappings, _CLASS_ORDER_FILE)).items()
  }
  if strange := [folder for folder in folders if folder not in classes]:
    raise UserError(
      f'{mappings / _FOLDER_FILE} knows no folder {strange[0]!r} of ObjectNet: are these its images?'
    )
  numbers = lambda names: tuple(number[line[name]] for name in names.split('; '))
  try:
    return tuple(
      numbers(overlap[classes[folder]]) if classes[folder] in overlap else () for folder in folders
    )
  except KeyError as error:
    raise UserError(
      f'{mappings}: {_OVERLAP_FILE} speaks of {error}, which {_IMAGENET_NAMES_FILE} or {_CLASS_ORDER_FILE} lacks'
    ) from None


def _read_mapping_file(mappings: Path, name: str) -> str:
  """A file's text."""
  try:
    return (mappings / name).read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    what = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{mappings / name}: {what}. ObjectNet has its map to ImageNet in the directory `mappings` of its archive: '
      'leave it beside `images`, or say where it is with --mapping'
    ) from None
