"""A URL -> a whole file in the cache: resumed where it was interrupted, checked against what is known of it, renamed last."""

import base64
import contextlib
import hashlib
import http.client
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from vit_jax.errors import UserError

TRIES = 6  # In a row without a new byte.
WAIT = 1.0  # Seconds before the second try; each later one waits twice as long.
TIMEOUT = 30.0  # Seconds without a byte.
CHUNK = 1 << 20  # Bytes.
UNITS = {'MiB': 2**20, 'GiB': 2**30}


def cache_directory() -> Path:
  """$VIT_JAX_CACHE, or 'vit_jax/released' in the user's cache."""
  default = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'vit_jax' / 'released'
  return Path(os.environ.get('VIT_JAX_CACHE') or default).expanduser()


def fetch(url: str, *, size: str = '', md5: str = '', directory: Path | None = None) -> Path:
  """Where the file of `url` lies on this machine; it is fetched if it is not there yet.

  `size`: as published, '393.69 MiB'; `md5`: in hexadecimal. What is there already is taken for whole, since only whole
  files get their name. UserError that says what to do where the file can't be had, or is not what it should be.
  """
  path = place(url, directory or cache_directory())
  if path.is_file():
    return path
  part = path.with_name(path.name + f'.{os.getpid()}.part')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    adopt(part)
    found = (over_http if url.startswith(('http://', 'https://')) else over_fsspec)(url, part)
    refuse_other_content(url, part, size, md5 or found)
    part.replace(path)
    part.with_suffix('.etag').unlink(missing_ok=True)
  except OSError as error:
    if isinstance(error, urllib.error.URLError | TimeoutError | ConnectionError):
      raise offline(url, path, size, error) from None
    raise UserError(f'can not write {path}: {error.strerror or error}; set VIT_JAX_CACHE to another directory') from None
  return path


def place(url: str, directory: Path) -> Path:
  """The host and the path of the URL below the directory. UserError for a URL that would lie elsewhere, or names no file."""
  parts = urllib.parse.urlsplit(url)
  names = [parts.hostname or '', *urllib.parse.unquote(parts.path).split('/')]
  names = [name for name in names if name]
  if len(names) < 2 or url.endswith('/') or any(name in ('.', '..') or re.search(r'[\\\0]', name) for name in names):
    raise UserError(f'{url!r} names no file')
  return directory.joinpath(*names)


def adopt(part: Path):
  """Takes over what an interrupted process has left; that of one that still runs is left alone."""
  name = re.sub(r'\d+\.part$', '', part.name)
  for other in part.parent.glob(f'{name}*.part'):
    pid = other.name.removeprefix(name).removesuffix('.part')
    if pid.isdigit() and not Path(f'/proc/{pid}').exists() and not part.exists():
      with contextlib.suppress(OSError):
        other.with_suffix('.etag').rename(part.with_suffix('.etag'))
        other.rename(part)


def over_http(url: str, part: Path) -> str:
  """Fetches what `part` lacks; the MD5 that the server gives, in hexadecimal, or ''. OSError where it is not to be had."""
  tries = 0
  while True:
    have = bytes_in(part)
    try:
      return one_request(url, part)
    except urllib.error.HTTPError as error:
      error.close()
      if error.code == 416:  # What is there is longer than the file: begin again.
        part.unlink(missing_ok=True)
      elif error.code not in (408, 429) and error.code < 500:
        raise UserError(f'{url}: the server says {error.code} {error.reason}') from None
      failure = error
    except (OSError, http.client.HTTPException) as error:
      failure = error
    tries = 0 if bytes_in(part) > have else tries + 1
    if tries == TRIES:
      raise failure if isinstance(failure, urllib.error.URLError) else urllib.error.URLError(failure)
    time.sleep(WAIT * 2 ** max(0, tries - 1))


def bytes_in(part: Path) -> int:
  """That are there already."""
  return part.stat().st_size if part.exists() else 0


def one_request(url: str, part: Path) -> str:
  """Asks for what is missing and appends it; the MD5 that the server gives. ConnectionError where less came than was promised.

  The version of the file (its ETag) is kept beside the part, so that no two versions are glued together.
  """
  have, version = bytes_in(part), part.with_suffix('.etag')
  headers = {'User-Agent': 'vit_jax', 'Accept-Encoding': 'identity'}
  if have and version.exists():
    headers |= {'Range': f'bytes={have}-', 'If-Range': version.read_text()}
  with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
    if response.headers.get_content_type() == 'text/html':
      raise UserError(f'{url} is a web page, not a file of arrays')
    begin = have if response.status == 206 else 0
    promised = response.headers.get('Content-Length')
    total = begin + int(promised) if promised else None
    with part.open('ab' if begin else 'wb') as out, bar(url, begin, total) as shown:
      if tag := response.headers.get('ETag'):
        version.write_text(tag)
      while data := response.read1(CHUNK):
        out.write(data)
        shown.update(len(data))
  if total is not None and bytes_in(part) < total:
    raise ConnectionError(f'only {bytes_in(part):,} of {total:,} bytes came')
  return md5_of(response.headers.get('x-goog-hash') or '')


def bar(url: str, begin: int, total: int | None) -> tqdm:
  """A progress bar, where somebody looks."""
  name = url.rpartition('/')[2]
  return tqdm(desc=name, initial=begin, total=total, unit='B', unit_scale=True, disable=not sys.stderr.isatty())


def md5_of(header: str) -> str:
  """Of Google's 'crc32c=…,md5=…', in hexadecimal, or ''."""
  match = re.search(r'md5=([\w+/=]+)', header)
  return base64.b64decode(match[1]).hex() if match else ''


def over_fsspec(url: str, part: Path) -> str:
  """Any other scheme, such as gs://; its library does the retrying."""
  import fsspec

  try:
    with fsspec.open(url, 'rb') as source, part.open('wb') as out, bar(url, 0, None) as shown:
      while data := source.read(CHUNK):
        out.write(data)
        shown.update(len(data))
  except ImportError:
    raise UserError(f"{url} needs `pip install '.[gcp]'`{public(url)}") from None
  except ValueError as error:  # A scheme that nobody knows.
    raise UserError(f'{url}: {error}') from None
  except FileNotFoundError:
    raise UserError(f'{url}: there is no such file') from None
  return ''


def public(url: str) -> str:
  """Where a file of a public bucket is to be had without an account."""
  scheme, _, rest = url.partition('://')
  return f'; public buckets are at https://storage.googleapis.com/{rest} too' if scheme == 'gs' else ''


def refuse_other_content(url: str, part: Path, size: str, md5: str):
  """UserError, and no part left, where the file is not of the published size or has another digest, or is a web page."""
  got = part.stat().st_size
  wrong = ''
  if size and not fits(got, size):
    wrong = f'it has {got:,} bytes ({got / 2**20:.2f} MiB), and {size} were published'
  with part.open('rb') as file:
    if file.read(512).lstrip()[:1] == b'<':
      wrong = 'it is a web page, not a file of arrays'
    file.seek(0)
    if md5 and not wrong and hashlib.file_digest(file, 'md5').hexdigest() != md5:
      wrong = f'its MD5 is not {md5}'
  if wrong:
    part.unlink()
    raise UserError(f'{url}: {wrong}')


def fits(count: int, size: str) -> bool:
  """Whether so many bytes are '393.69 MiB', to the precision that is printed."""
  number, unit = size.split()
  decimals = len(number.partition('.')[2])
  return abs(count / UNITS[unit] - float(number)) <= 0.6 * 10**-decimals


def offline(url: str, path: Path, size: str, error: Exception) -> UserError:
  """What to do by hand."""
  why = getattr(error, 'reason', error)
  why = why.strerror if isinstance(why, OSError) and not isinstance(why, socket.gaierror) and why.strerror else why
  much = f' ({size})' if size else ''
  return UserError(f'can not fetch {url} ({why}): get it on another machine{much} and put it at {path}')
