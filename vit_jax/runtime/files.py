"""Small files on storage that fails occasionally.

Writes are atomic, reads are bounded in size, and both are retried.
"""

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from vit_jax.errors import StorageError, UserError

T = TypeVar('T')

RETRY_DELAYS = (0.5, 1.0, 2.0)  # Seconds before the second, third and fourth attempt.
MAX_TEXT_BYTES = 64 * 2**20  # Limit for text files; leaves.json of ViT-G has 20 KB.

# Errors that retrying cannot fix.
PERMANENT_ERRNOS = {
  errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS, errno.ELOOP,
  errno.ENAMETOOLONG, errno.EINVAL,
}  # fmt: skip


def retry_io(what: str, function: Callable[[], T]) -> T:
  """Return `function()`, retrying after each of `RETRY_DELAYS` if it raises OSError.

  `what` names the operation in the message. Raises StorageError if all attempts fail. An OSError
  that retrying cannot fix is raised immediately.
  """
  for pause in RETRY_DELAYS:
    try:
      return function()
    except OSError as error:
      if error.errno in PERMANENT_ERRNOS:
        raise
    time.sleep(pause)
  try:
    return function()
  except OSError as error:
    raise StorageError(
      f'{what}: {summarize_error(error)} ({len(RETRY_DELAYS) + 1} attempts)'
    ) from error


@contextlib.contextmanager
def plain_alias(directory: Path) -> Iterator[Path]:
  """Yield /proc/self/fd/N, another path of a directory, which has no special character.

  Orbax reads `[` in a path as a pattern, and a backslash and `gs:` as more than characters.
  TensorStore refuses names that are not UTF-8. The alias also follows a directory that is renamed,
  and nothing can recreate a removed one through it. Without /proc, yield the absolute path.
  """
  descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
  try:
    alias = Path(f'/proc/self/fd/{descriptor}')
    yield alias if alias.exists() else directory.resolve()
  finally:
    os.close(descriptor)


def split_pattern(pattern: str) -> tuple[Path, str]:
  """Return (the longest existing directory that a pattern starts with, the rest of the pattern).

  The directory is taken literally, so that it may contain `[` and `*`.

  Raises UserError for the home directory of an unknown user.
  """
  try:
    path = Path(pattern).expanduser()
  except RuntimeError:
    raise UserError(f'{pattern}: this user has no home directory') from None
  directory = next((each for each in path.parents if each.is_dir()), Path(path.anchor))
  return directory, str(path.relative_to(directory))


def name_alias(text: str, directory: Path) -> str:
  """Return an error message with the path of the directory in place of its `plain_alias`."""
  return re.sub(r'/proc/self/fd/\d+', lambda _: str(directory), text)


def summarize_error(error: BaseException) -> str:
  """Return the first line of an error, at most 300 characters; its type if it has no text."""
  text = getattr(error, 'strerror', None) or str(error).strip() or type(error).__name__
  return text.splitlines()[0][:300]


@contextlib.contextmanager
def explain_write_errors(workdir: Path) -> Iterator[None]:
  """Turn an OSError inside the context into a UserError that suggests another --workdir."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write to {workdir}: {summarize_error(error)}; choose another --workdir'
    ) from None


def write_atomically(path: Path, content: str | bytes, *, private: bool = False):
  """Replace a file atomically: readers see the old or the new content, also after a crash.

  Only the user can read a private file, from its first byte on.
  """
  opener = lambda name, flags: os.open(name, flags, 0o600 if private else 0o666)

  def write():
    part = path.with_name(f'.{path.name}.part')
    try:
      if private:
        part.unlink(missing_ok=True)  # One of an interrupted write keeps its mode.
      with open(part, 'wb', opener=opener) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
      part.replace(path)
    except OSError:
      with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
      raise

  retry_io(f'writing {path}', write)


def sync_folder(folder: Path):
  """Sync the names of the files of a directory to the disk, if the file system can do it."""
  descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    with contextlib.suppress(OSError):  # Some file systems sync only files.
      os.fsync(descriptor)
  finally:
    os.close(descriptor)


def append_text(path: Path, text: str):
  """Append UTF-8 text to a file. If that fails, the file is as before, and OSError is raised."""
  content = memoryview(text.encode())
  with path.open('ab', buffering=0) as file:
    size = file.tell()
    try:
      while content:
        content = content[file.write(content) :]
    except OSError:
      with contextlib.suppress(OSError):
        file.truncate(size)
      raise


def read_text_file(path: Path) -> str:
  """Return the text of a file. Raises UserError if it is unreadable or over 64 MiB."""

  def read() -> bytes:
    with path.open('rb') as file:
      return file.read(MAX_TEXT_BYTES + 1)

  if path.exists() and not path.is_file():  # A pipe or a device might be read for ever.
    raise UserError(f'cannot read {path}: it is not a regular file')
  try:
    content = retry_io(f'reading {path}', read)
    if len(content) > MAX_TEXT_BYTES:
      raise UserError(
        f'{path} is larger than {MAX_TEXT_BYTES // 2**20} MiB, the limit for text files'
      )
    return content.decode()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'cannot read {path}: {summarize_error(error)}') from None


def read_json_object(path: Path) -> dict:
  """Return the JSON object in a file. Raises UserError if it holds anything else."""
  try:
    content = json.loads(read_text_file(path))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not valid JSON: {summarize_error(error)}') from None
  if not isinstance(content, dict):
    raise UserError(f'{path} holds a JSON {type(content).__name__}; expected an object')
  return content


def user_cache_dir(name: str) -> Path:
  """Return the folder `name` in the user's cache directory; it may not exist yet."""
  return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'vit_jax' / name


def escape_formula(cell):
  """Return a cell of a CSV file with `'` before text that a spreadsheet would execute.

  Numbers, also as text, stay as they are.
  """
  if not isinstance(cell, str) or not cell.startswith(('=', '+', '-', '@', '\t', '\r')):
    return cell
  try:
    float(cell)
  except ValueError:
    return f"'{cell}"
  return cell
