"""Small files on storage that now and then fails: written whole or not at all, read within bounds, tried a few times."""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from vit_jax.errors import StorageError, UserError

T = TypeVar('T')

RETRY_DELAYS = (0.5, 1.0, 2.0)  # Seconds before a second, third and fourth try.
MAX_TEXT_BYTES = 64 * 2**20  # Bytes of a file of text; that of ViT-G's leaves has 20 KB.

# Errors that do not go away by themselves.
PERMANENT_ERRNOS = {
  errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL,
}  # fmt: skip


def retry_io(what: str, function: Callable[[], T]) -> T:
  """`function()`, tried again after each of `RETRY_DELAYS` where the storage fails; then StorageError.

  An error that will stay comes through at once, as it is.
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
      f'{what}: {summarize_error(error)}, {len(RETRY_DELAYS) + 1} times'
    ) from error


def summarize_error(error: BaseException) -> str:
  """An error in half a line."""
  text = getattr(error, 'strerror', None) or str(error).strip() or type(error).__name__
  return text.splitlines()[0][:300]


@contextlib.contextmanager
def explain_write_errors(workdir: Path) -> Iterator[None]:
  """In here an OSError is a UserError that asks for another directory."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'can not write to {workdir}: {summarize_error(error)}; choose another --workdir'
    ) from None


def write_atomically(path: Path, content: str | bytes):
  """Writes a file that others read meanwhile: they see the old one or the new one, as does who comes after a crash."""

  def write():
    part = path.with_name(f'.{path.name}.part')
    with part.open('wb') as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)

  retry_io(f'writing {path}', write)


def read_text_file(path: Path) -> str:
  """A file of text. UserError where it is none, or far larger than any of ours."""

  def read() -> bytes:
    with path.open('rb') as file:
      return file.read(MAX_TEXT_BYTES + 1)

  try:
    content = retry_io(f'reading {path}', read)
    if len(content) > MAX_TEXT_BYTES:
      raise UserError(f'{path} is larger than {MAX_TEXT_BYTES // 2**20} MiB: it is none of ours')
    return content.decode()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'can not read {path}: {summarize_error(error)}') from None


def read_json_object(path: Path) -> dict:
  """A JSON object. UserError where there is none."""
  try:
    content = json.loads(read_text_file(path))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is no JSON: {summarize_error(error)}') from None
  if not isinstance(content, dict):
    raise UserError(f'{path} holds {type(content).__name__}, and a JSON object is expected')
  return content


def user_cache_dir(name: str) -> Path:
  """The folder for things of one kind in the user's cache directory; it need not be there yet."""
  return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'vit_jax' / name
