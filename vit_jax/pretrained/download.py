"""A URL -> a whole file in the cache: resumed where it was interrupted, checked against what is known of it, renamed last."""

import base64
import contextlib
import errno
import fcntl
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
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from vit_jax.errors import UserError
from vit_jax.runtime.files import user_cache_dir

MAX_DOWNLOAD_TRIES = 5  # In a row without a new byte.
FIRST_RETRY_WAIT = 1.0  # Seconds before the second try; each later one waits twice as long.
READ_TIMEOUT = 30.0  # Seconds without a byte.
DOWNLOAD_CHUNK = 1 << 20  # Bytes.
SIZE_UNITS = {'MiB': 2**20, 'GiB': 2**30}
HTTP_SCHEMES = ('http', 'https')
DISK_ERRNOS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EIO,
)  # What a disk says, and no network.


def released_cache_dir() -> Path:
  """$VIT_JAX_CACHE, or 'vit_jax/released' in the user's cache."""
  return Path(os.environ.get('VIT_JAX_CACHE') or user_cache_dir('released')).expanduser()


def fetch(url: str, *, size: str = '', md5: str = '', directory: Path | None = None) -> Path:
  """Where the file of `url` lies on this machine; it is fetched if it is not there yet.

  `size`: as published, '393.69 MiB'; `md5`: in hexadecimal. What is there already is taken for whole if its size fits: only
  whole files get their name here, but people put others there by hand. A file:// URL is that file itself, uncopied.
  UserError that says what to do where the file can't be had, or is not what it should be.
  """
  path = cache_path(url, directory or released_cache_dir())
  if path.is_file():
    return check_cached_size(path, size)
  scheme = urllib.parse.urlsplit(url).scheme
  if scheme == 'file':
    raise UserError(f'{url}: there is no such file')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_partial_file(path) as part:
      if not path.is_file():  # Nobody has fetched it while this waited.
        found = (download_http if scheme in HTTP_SCHEMES else download_fsspec)(url, part)
        check_content(url, part, size, md5 or found)
        Path(part.name).replace(path)
        etag_path(part).unlink(missing_ok=True)
  except OSError as error:
    if isinstance(error, urllib.error.URLError):
      raise offline_error(url, path, size, error) from None
    raise UserError(
      f'can not write {path}: {error.strerror or error}; set VIT_JAX_CACHE to another directory'
    ) from None
  return path


def check_cached_size(path: Path, size: str) -> Path:
  """The path. UserError where the file there is not of the published size."""
  have = path.stat().st_size
  if size and not matches_published_size(have, size):
    raise UserError(
      f'{path} has {have:,} bytes ({have / 2**20:.2f} MiB), and {size} were published: delete it, and try again'
    )
  return path


def cache_path(url: str, directory: Path) -> Path:
  """The host and the path of the URL below the directory. UserError for a URL that would lie elsewhere, or names no file.

  Whatever tells two files apart is in it: a port, a query (by its digest), a scheme that isn't the web's.
  """
  try:
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.unquote(parts.path)
  except ValueError as error:
    raise UserError(f'{url!r} is no URL: {error}') from None
  if parts.scheme == 'file' and parts.netloc in ('', 'localhost'):
    return Path(path)
  host = parts.netloc.rpartition('@')[2]
  names = [name for name in (host, *path.split('/')) if name]
  if (
    len(names) < 2
    or not host
    or path.endswith('/')
    or any(name in ('.', '..') or re.search(r'[\\\0]', name) for name in names)
  ):
    raise UserError(f'{url!r} names no file')
  if parts.query:
    names.insert(-1, hashlib.sha256(parts.query.encode()).hexdigest()[:16])
  return (
    directory.joinpath(*names)
    if parts.scheme in HTTP_SCHEMES
    else directory.joinpath(parts.scheme, *names)
  )


@contextlib.contextmanager
def open_partial_file(path: Path) -> Iterator[BinaryIO]:
  """What has come of the file so far, to append to; nobody else has it, in whatever thread, container or host.

  Waits for whoever has it. What an interrupted process has left is gone on with; nothing is left where nothing came.
  """
  name = path.with_name(path.name + '.part')
  with open_locked(name) as part:
    try:
      yield part
    finally:
      if downloaded_bytes(part) == 0:
        name.unlink(missing_ok=True)


def open_locked(name: Path) -> BinaryIO:
  """The file of that name, opened and locked. One that was renamed, or refused, while this waited, is not it any more."""
  while True:
    part = name.open('a+b')
    fcntl.flock(part, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(name.stat(), os.fstat(part.fileno())):
        return part
    part.close()


def downloaded_bytes(part: BinaryIO) -> int:
  """Bytes that are there already."""
  part.flush()
  return os.fstat(part.fileno()).st_size


def etag_path(part: BinaryIO) -> Path:
  """Keeps the ETag of what has come, so that no two versions of a file are glued together."""
  return Path(part.name).with_suffix('.etag')


def download_http(url: str, part: BinaryIO) -> str:
  """Fetches what `part` lacks; the MD5 that the server gives, in hexadecimal, or ''. URLError where it is not to be had."""
  tries, most = 0, downloaded_bytes(part)
  while True:
    try:
      return request_remaining(url, part)
    except urllib.error.HTTPError as error:
      error.close()
      if error.code == 416:  # What is there is longer than the file: begin again.
        part.truncate(0)
      elif error.code not in (408, 429) and error.code < 500:
        raise UserError(
          f'{url}: the server says {error.code} {" ".join(str(error.reason).split())}'
        ) from None
      failure = error
    except (ValueError, http.client.InvalidURL) as error:
      raise UserError(f'{url!r} is no URL: {error}') from None
    except (OSError, http.client.HTTPException) as error:
      if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        raise
      failure = error
    tries = 0 if downloaded_bytes(part) > most else tries + 1
    most = max(most, downloaded_bytes(part))
    if tries == MAX_DOWNLOAD_TRIES:
      raise (
        failure if isinstance(failure, urllib.error.URLError) else urllib.error.URLError(failure)
      )
    time.sleep(FIRST_RETRY_WAIT * 2 ** max(0, tries - 1))


def request_remaining(url: str, part: BinaryIO) -> str:
  """Asks for what is missing and appends it; the MD5 that the server gives. ConnectionError where not all of it came."""
  have, version = downloaded_bytes(part), etag_path(part)
  headers = {'User-Agent': 'vit_jax', 'Accept-Encoding': 'identity'}
  tag = version.read_text(errors='replace') if version.exists() else ''
  tag = (
    tag if re.fullmatch(r'"[\x21\x23-\x7e]*"', tag) else ''
  )  # Neither a weak one, which may not be asked for, nor damage.
  if have and tag:
    headers |= {'Range': f'bytes={have}-', 'If-Range': tag}
  with urllib.request.urlopen(
    urllib.request.Request(quote_url(url), headers=headers), timeout=READ_TIMEOUT
  ) as response:
    if response.headers.get_content_type() == 'text/html':
      raise UserError(f'{url} is a web page, not a file of arrays')
    begin = have if response.status == 206 else 0
    if begin and not is_continuation(response.headers, begin, tag):
      part.truncate(0)
      raise ConnectionError(f'another part came than that from {begin:,} bytes on')
    if not begin:
      part.truncate(0)
      version.write_text(response.headers.get('ETag') or '')
    promised = response.headers.get('Content-Length')
    total = begin + int(promised) if promised and promised.isdecimal() else None
    with progress_bar(url, begin, total) as shown:
      while data := response.read1(DOWNLOAD_CHUNK):
        part.write(data)
        shown.update(len(data))
  if total is not None and downloaded_bytes(part) < total:
    raise ConnectionError(f'only {downloaded_bytes(part):,} of {total:,} bytes came')
  return parse_md5_header(
    ','.join(response.headers.get_all('x-goog-hash', []))
  )  # One line for each digest, or one for all.


def quote_url(url: str) -> str:
  """With spaces and other alphabets as servers want them; what is quoted already stays as it is."""
  return urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")


def is_continuation(headers: http.client.HTTPMessage, begin: int, tag: str) -> bool:
  """Whether an answer goes on, in the same version of the file, where the part ends."""
  span = re.fullmatch(r'bytes (\d+)-(\d+)/(\d+|\*)', headers.get('Content-Range') or '')
  whole = span is not None and span[3] in ('*', str(int(span[2]) + 1))
  return whole and int(span[1]) == begin and headers.get('ETag', tag) == tag


def progress_bar(url: str, begin: int, total: int | None) -> tqdm:
  """A progress bar, where somebody looks."""
  name = url.rpartition('/')[2]
  return tqdm(
    desc=name,
    initial=begin,
    total=total,
    unit='B',
    unit_scale=True,
    disable=not sys.stderr.isatty(),
  )


def parse_md5_header(header: str) -> str:
  """Of Google's 'crc32c=…,md5=…', in hexadecimal, or ''."""
  match = re.search(r'md5=([\w+/]{22}==)', header)
  return base64.b64decode(match[1]).hex() if match else ''


def download_fsspec(url: str, part: BinaryIO) -> str:
  """Any other scheme, such as gs://; its library does the retrying."""
  part.truncate(0)
  with progress_bar(url, 0, None) as shown:
    for data in read_fsspec_chunks(url):
      part.write(data)
      shown.update(len(data))
  return ''


def read_fsspec_chunks(url: str) -> Iterator[bytes]:
  """What fsspec reads, all of it. UserError for whatever goes wrong in its many libraries, each with its own exceptions."""
  import fsspec

  try:
    with fsspec.open(url, 'rb') as source:
      have = 0
      while data := source.read(DOWNLOAD_CHUNK):
        have += len(data)
        yield data
      if have != (getattr(source, 'size', None) or have):
        raise ConnectionError(f'only {have:,} of {source.size:,} bytes came')
  except ImportError as error:
    needs = (
      "needs gcsfs: pip install 'vit-jax[gcp]'"
      if url.startswith('gs://')
      else f'can not be read: {error}'
    )
    raise UserError(f'{url} {needs}{public_bucket_hint(url)}') from None
  except FileNotFoundError:
    raise UserError(f'{url}: there is no such file') from None
  except Exception as error:
    raise UserError(
      f'{url}: {" ".join(str(error).split()) or type(error).__name__}{public_bucket_hint(url)}'
    ) from None


def public_bucket_hint(url: str) -> str:
  """Where a file of a public bucket is to be had without an account."""
  scheme, _, rest = url.partition('://')
  return (
    f'; public buckets are at https://storage.googleapis.com/{rest} too' if scheme == 'gs' else ''
  )


def check_content(url: str, part: BinaryIO, size: str, md5: str):
  """UserError, and no part left, where the file is not of the published size or has another digest, or is a web page."""
  got = downloaded_bytes(part)
  wrong = '' if got else 'it is empty'
  if size and not matches_published_size(got, size):
    wrong = f'it has {got:,} bytes ({got / 2**20:.2f} MiB), and {size} were published'
  part.seek(0)
  if part.read(512).removeprefix(b'\xef\xbb\xbf').lstrip()[:1] == b'<':
    wrong = 'it is a web page, not a file of arrays'
  part.seek(0)
  if md5 and not wrong and hashlib.file_digest(part, 'md5').hexdigest() != md5.lower():
    wrong = f'its MD5 is not {md5}'
  if wrong:
    part.truncate(0)
    etag_path(part).unlink(missing_ok=True)
    raise UserError(f'{url}: {wrong}')


def matches_published_size(count: int, size: str) -> bool:
  """Whether so many bytes are '393.69 MiB', to the precision that is printed."""
  number, unit = size.split()
  decimals = len(number.partition('.')[2])
  return abs(count / SIZE_UNITS[unit] - float(number)) <= 0.6 * 10**-decimals


def offline_error(url: str, path: Path, size: str, error: Exception) -> UserError:
  """What to do by hand."""
  why = getattr(error, 'reason', error)
  why = (
    why.strerror
    if isinstance(why, OSError) and not isinstance(why, socket.gaierror) and why.strerror
    else why
  )
  much = f' ({size})' if size else ''
  return UserError(
    f'can not fetch {url} ({why}): get it on another machine{much} and put it at {path}'
  )
