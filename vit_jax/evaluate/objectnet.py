"""The ImageNet classes that correspond to each class of ObjectNet.

They are read from the files in the directory `mappings` of ObjectNet's archive (objectnet.dev). The
archive has its own licence, so none of it is included here.
"""

import json
from pathlib import Path

from vit_jax.errors import UserError

OBJECTNET_BORDER = 2  # Pixels of the red frame of every image. It is to be removed.

# Names of files, and their contents.
_FOLDER_FILE = 'folder_to_objectnet_label.json'  # {folder of images: class of ObjectNet}
_OVERLAP_FILE = 'objectnet_to_imagenet_1k.json'  # {class of ObjectNet: 'name; name' of ImageNet's}
_IMAGENET_NAMES_FILE = 'imagenet_to_label_2012_v2'  # A name a line, in the order of ILSVRC's ids.
_CLASS_ORDER_FILE = 'pytorch_to_imagenet_2012_id.json'  # {index in the order of synsets: ILSVRC id}


def read_objectnet_classes(folders: tuple[str, ...], mappings: Path) -> tuple[tuple[int, ...], ...]:
  """Return the indices of the correct ImageNet classes for each folder of images.

  A folder whose class is not in ImageNet has none. Raises UserError if a file in `mappings` is
  missing or does not match the folders.
  """
  class_of_folder = json.loads(_read_mapping_file(mappings, _FOLDER_FILE))
  overlap = json.loads(_read_mapping_file(mappings, _OVERLAP_FILE))
  lines = _read_mapping_file(mappings, _IMAGENET_NAMES_FILE).splitlines()
  ilsvrc_id = {name.strip(): i for i, name in enumerate(lines)}
  order = json.loads(_read_mapping_file(mappings, _CLASS_ORDER_FILE))
  index_of_id = {ilsvrc: int(index) for index, ilsvrc in order.items()}
  if unknown := [folder for folder in folders if folder not in class_of_folder]:
    raise UserError(
      f'{mappings / _FOLDER_FILE} has no folder {unknown[0]!r} of ObjectNet: '
      'are these images from ObjectNet?'
    )

  def imagenet_indices(name: str) -> tuple[int, ...]:
    return tuple(index_of_id[ilsvrc_id[each]] for each in overlap[name].split('; '))

  names = [class_of_folder[folder] for folder in folders]
  try:
    return tuple(imagenet_indices(name) if name in overlap else () for name in names)
  except KeyError as error:
    raise UserError(
      f'{mappings}: {_OVERLAP_FILE} contains {error}, which is missing in '
      f'{_IMAGENET_NAMES_FILE} or {_CLASS_ORDER_FILE}'
    ) from None


def _read_mapping_file(mappings: Path, name: str) -> str:
  try:
    return (mappings / name).read_text(encoding='utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f"{mappings / name}: {reason}. ObjectNet's archive has its mapping to ImageNet in the "
      'directory `mappings`: leave it beside `images`, or give its path with --mapping'
    ) from None
