"""List and read the image files below a folder: the same files for training and for prediction.

A file is an image by its extension. Hidden files and folders are ignored. Links to folders are
followed; a folder that several paths lead to is listed once, so loops of links end.
"""

import collections
import functools
import importlib.util
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from vit_jax.data.decode import BadImageError
from vit_jax.runtime.screen import print_stderr

# Extensions are compared in lower case.
_EXTENSIONS = (
  '.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.webp', '.gif', '.bmp', '.dib', '.tif',
  '.tiff', '.avif', '.jp2', '.j2k', '.jpf', '.jpx', '.ppm', '.pgm', '.pbm', '.pnm',
)  # fmt: skip
HEIC_EXTENSIONS = ('.heic', '.heif', '.hif')  # Need pillow-heif.
# Folders and files that operating systems add.
IGNORED_NAMES = ('__MACOSX', '@eaDir', 'Thumbs.db', 'desktop.ini')
NOT_REGULAR = 'not a regular file'
MAX_LISTED = 5  # Classes, or kinds of files, in a message.
MAX_IMAGE_FILE_BYTES = 1 << 30  # Larger files are not read.


@functools.cache
def image_extensions() -> tuple[str, ...]:
  """Return the extensions of the images that this installation reads."""
  has_heif = importlib.util.find_spec('pillow_heif') is not None
  return _EXTENSIONS + HEIC_EXTENSIONS if has_heif else _EXTENSIONS


def list_images(folder: Path) -> tuple[list[str], dict[str, int]]:
  """Return the sorted paths of the images below a folder, and the number of other files by kind.

  Paths are relative to the folder. A kind is an extension, 'no extension' or NOT_REGULAR.
  """
  images, others = [], collections.Counter()
  for path, is_regular in _walk(folder):
    if not is_regular:
      others[NOT_REGULAR] += 1
    elif _has_image_name(path):
      images.append(path)
    else:
      others[os.path.splitext(path)[1].lower() or 'no extension'] += 1  # noqa: PTH122
  return sorted(images), dict(others)


def has_image(folder: Path) -> bool:
  """Return whether there is an image below a folder, without listing it in full."""
  return any(is_regular and _has_image_name(path) for path, is_regular in _walk(folder))


def list_folders(folder: Path) -> list[str]:
  """Return the sorted names of the folders in a folder, and of links to folders."""
  return sorted(entry.name for entry in _scan(folder) if _find_type(entry)[0])


def describe_other_files(others: dict[str, int]) -> str:
  """Return text such as '12 .txt, 3 .heic', the largest number first."""
  kinds = sorted(others.items(), key=lambda item: (-item[1], item[0]))
  text = ', '.join(f'{count:,} {kind}' for kind, count in kinds[:MAX_LISTED])
  return text + (', …' if len(kinds) > MAX_LISTED else '')


def suggest_heic(kinds: Iterable[str]) -> str:
  """Return how to read HEIC files if some of `kinds` are, and cannot be read yet."""
  if set(kinds).isdisjoint(HEIC_EXTENSIONS):
    return ''
  return "; to read HEIC images: pip install 'vit-jax[heic]'"


def note_passed_over(title: str, by_class: dict[str, dict[str, int]]):
  """Print which files of which classes are not images, once in a process.

  Args:
    title: Name of the data.
    by_class: {class: number of files by kind}. The class '' stands for data without classes.
  """
  by_class = {name: others for name, others in by_class.items() if others}
  if not by_class:
    return
  total = sum(sum(others.values()) for others in by_class.values())
  details = [
    f'{name}: {describe_other_files(others)}' if name else describe_other_files(others)
    for name, others in list(by_class.items())[:MAX_LISTED]
  ]
  if len(by_class) > MAX_LISTED:
    details.append(f'and {len(by_class) - MAX_LISTED:,} more classes')
  classes = 'class' if len(by_class) == 1 else 'classes'
  where = '' if '' in by_class else f' in {len(by_class):,} {classes}'
  _print_once(
    f'{title}: passed over {total:,} {"file" if total == 1 else "files"}{where} without the '
    f'extension of an image ({"; ".join(details)})'
    f'{suggest_heic(kind for others in by_class.values() for kind in others)}'
  )


@functools.cache
def _print_once(text: str):
  """Print a note to stderr, unless the process has printed it before."""
  print_stderr(printable(text))


def read_image_file(path: Path) -> bytes:
  """Read a file.

  Raises BadImageError if it cannot be read, is not a regular file, or is larger than
  MAX_IMAGE_FILE_BYTES.
  """
  try:
    with open(path, 'rb', opener=_open_without_waiting) as file:
      status = os.fstat(file.fileno())
      if not stat.S_ISREG(status.st_mode):
        raise BadImageError(printable(path), 'it is not a regular file')
      if status.st_size > MAX_IMAGE_FILE_BYTES:
        raise BadImageError(printable(path), f'{status.st_size:,} bytes are too many for an image')
      return file.read()
  except (OSError, ValueError) as error:  # ValueError: a zero byte in the path.
    reason = getattr(error, 'strerror', None) or error
    raise BadImageError(printable(path), f'the file cannot be read ({reason})') from None


def printable(path: Path | str) -> str:
  """Return a path in which bytes that are not UTF-8 are escaped."""
  return str(path).encode('utf-8', 'backslashreplace').decode()


def _open_without_waiting(path: str, flags: int) -> int:
  """Open a file. A named pipe that nothing writes to would block otherwise."""
  return os.open(path, flags | os.O_NONBLOCK)


def _has_image_name(path: str) -> bool:
  return path.lower().endswith(image_extensions())


def _walk(root: Path) -> Iterator[tuple[str, bool]]:
  """Yield (path relative to the root, is a regular file) for each file, in any order.

  Real folders come before links to folders, so that their paths are those of the images.
  """
  seen, folders, links = set(), [''], []
  while folders or links:
    prefix = folders.pop() if folders else links.pop(links.index(min(links)))
    status = os.stat(root / prefix)  # noqa: PTH116
    if (status.st_dev, status.st_ino) in seen:
      continue
    seen.add((status.st_dev, status.st_ino))
    for entry in _scan(root / prefix):
      is_folder, is_regular = _find_type(entry)
      if not is_folder:
        yield prefix + entry.name, is_regular
      else:
        (links if entry.is_symlink() else folders).append(f'{prefix}{entry.name}/')


def _scan(folder: Path) -> Iterator[os.DirEntry]:
  """Yield the entries of a folder that are neither hidden nor added by an operating system."""
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.name[0] != '.' and entry.name not in IGNORED_NAMES:
        yield entry


def _find_type(entry: os.DirEntry) -> tuple[bool, bool]:
  """Return (is a folder, is a regular file) of what an entry leads to."""
  try:
    return entry.is_dir(), entry.is_file()
  except OSError:  # A link to itself, or into a folder without permission.
    return False, False
