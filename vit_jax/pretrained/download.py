"""Download a URL to a file in the cache.

A download resumes where it was interrupted. The result is checked against the published size and
digest, and gets its final name last.
"""

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

from vit_jax.errors import UserError, mask_credentials
from vit_jax.pretrained.http_safety import (
  HTTP_SCHEMES,
  RateLimit,
  open_url,
)
from vit_jax.pretrained.published_size import (
  describe_wrong_size,
  matches_published_size,
  max_bytes,
)
from vit_jax.runtime.files import user_cache_dir

MAX_DOWNLOAD_TRIES = 5  # Consecutive tries without a new byte.
FIRST_RETRY_WAIT = 1.0  # Seconds before the second try. Each later wait is twice as long.
READ_TIMEOUT = 30.0  # Seconds without a byte.
DOWNLOAD_CHUNK = 1 << 20  # Bytes.
MAX_NAME_BYTES = 240  # File systems allow 255; '.part' is appended.
# Errors of the disk, not of the network.
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def released_cache_dir() -> Path:
  """Return $VIT_JAX_CACHE, or 'vit_jax/released' in the user's cache directory."""
  return Path(os.environ.get('VIT_JAX_CACHE') or user_cache_dir('released')).expanduser()


def fetch(url: str, *, size: str = '', md5: str = '', directory: Path | None = None) -> Path:
  """Return the local path of the file at `url`, and download it if it is not cached.

  Args:
    url: an http(s) URL, a URL that fsspec can open, or a file:// URL, which is not copied.
    size: published size, such as '393.69 MiB'. A cached file is checked only against its size,
      because only complete downloads get their final name, but people also put files there by hand.
    md5: published digest, in hexadecimal.
    directory: root of the cache. The default is `released_cache_dir()`.

  Raises UserError with a remedy if the file is unavailable, or if its content is wrong. Messages
  do not show user names and passwords of URLs.
  """
  try:
    return _fetch(url, size=size, md5=md5, directory=directory or released_cache_dir())
  except UserError as error:
    raise UserError(mask_credentials(str(error))) from None


def _fetch(url: str, *, size: str, md5: str, directory: Path) -> Path:
  path = cache_path(url, directory)
  if path.is_file():
    return check_cached_size(path, size)
  scheme = urllib.parse.urlsplit(url).scheme
  if scheme == 'file':
    raise UserError(f'{url}: the file does not exist')
  download = download_http if scheme in HTTP_SCHEMES else download_fsspec
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_partial_file(path) as part:
      if not path.is_file():  # Another process may have finished it during the wait for the lock.
        server_md5 = download(url, part, max_bytes(size))
        check_content(url, part, size, md5 or server_md5)
        Path(part.name).replace(path)
        etag_path(part).unlink(missing_ok=True)
  except urllib.error.URLError as error:
    raise offline_error(url, path, size, error) from None
  except OSError as error:
    raise UserError(
      f'cannot write {path}: {error.strerror or error}; set VIT_JAX_CACHE to another directory'
    ) from None
  return path


def check_cached_size(path: Path, size: str) -> Path:
  """Return the path. Raises UserError if the file does not have the published size."""
  actual = path.stat().st_size
  if size and not matches_published_size(actual, size):
    raise UserError(f'{path} {describe_wrong_size(actual, size)}: delete it, and try again')
  return path


def cache_path(url: str, directory: Path) -> Path:
  """Return the path of a URL in the cache: its host and path below `directory`.

  The port, a digest of the query, and a scheme other than http(s) are part of it, so that different
  files have different paths.

  Raises UserError if the URL names no file, or if its path would leave the directory.
  """
  try:
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.unquote(parts.path)
  except ValueError as error:
    raise UserError(f'{url!r} is not a URL: {error}') from None
  if parts.scheme == 'file' and parts.netloc in ('', 'localhost'):
    return Path(path)
  host = parts.netloc.rpartition('@')[2]
  names = [shorten_name(name) for name in (host, *path.split('/')) if name]
  unsafe = any(name in ('.', '..') or re.search(r'[\\\0]', name) for name in names)
  if len(names) < 2 or not host or path.endswith('/') or unsafe:
    raise UserError(f'{url!r} does not name a file')
  if parts.query:
    names.insert(-1, hashlib.sha256(parts.query.encode()).hexdigest()[:16])
  if parts.scheme not in HTTP_SCHEMES:
    names.insert(0, parts.scheme)
  return directory.joinpath(*names)


def shorten_name(name: str) -> str:
  """Return a file name, or a digest with its suffix if the name is too long for file systems."""
  encoded = name.encode(errors='surrogateescape')
  if len(encoded) <= MAX_NAME_BYTES:
    return name
  suffix = Path(name).suffix
  return hashlib.sha256(encoded).hexdigest() + (suffix if len(suffix) < 20 else '')


@contextlib.contextmanager
def open_partial_file(path: Path) -> Iterator[BinaryIO]:
  """Open the partial download of `path` for appending, under an exclusive lock.

  The lock excludes other threads, processes and hosts, and waits for them. A partial download of an
  interrupted process is continued. An empty partial file is deleted at the end.
  """
  name = path.with_name(path.name + '.part')
  with open_locked(name) as part:
    try:
      yield part
    finally:
      if downloaded_bytes(part) == 0:
        name.unlink(missing_ok=True)


def open_locked(name: Path) -> BinaryIO:
  """Open and lock the file with this name.

  While this process waits for the lock, the previous owner may rename or delete the file. Then the
  name is opened again.
  """
  while True:
    part = name.open('a+b')
    fcntl.flock(part, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(name.stat(), os.fstat(part.fileno())):
        return part
    part.close()


def downloaded_bytes(part: BinaryIO) -> int:
  """Return the number of bytes in the partial file."""
  part.flush()
  return os.fstat(part.fileno()).st_size


def etag_path(part: BinaryIO) -> Path:
  """Return the path that stores the ETag of the partial file.

  The ETag prevents that two versions of a file are joined.
  """
  return Path(part.name).with_suffix('.etag')


def download_http(url: str, part: BinaryIO, limit: int) -> str:
  """Download the missing bytes, with retries, and return the server's MD5 in hexadecimal, or ''.

  Raises UserError if the server refuses, is too slow, or sends more than `limit` bytes. Raises
  URLError after `MAX_DOWNLOAD_TRIES` tries without progress.
  """
  tries, most = 0, downloaded_bytes(part)
  while True:
    try:
      return request_remaining(url, part, limit)
    except urllib.error.HTTPError as error:
      error.close()
      if error.code == 416:  # The partial file is longer than the file: start again.
        part.truncate(0)
      elif error.code not in (408, 429) and error.code < 500:
        reason = ' '.join(str(error.reason).split())
        raise UserError(f'{url}: the server responds {error.code} {reason}') from None
      failure = error
    except (ValueError, http.client.InvalidURL) as error:
      raise UserError(f'{url!r} is not a URL: {error}') from None
    except (OSError, http.client.HTTPException) as error:
      if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        raise
      failure = error
    tries = 0 if downloaded_bytes(part) > most else tries + 1
    most = max(most, downloaded_bytes(part))
    if tries == MAX_DOWNLOAD_TRIES:
      is_url_error = isinstance(failure, urllib.error.URLError)
      raise failure if is_url_error else urllib.error.URLError(failure)
    time.sleep(FIRST_RETRY_WAIT * 2 ** max(0, tries - 1))


def request_remaining(url: str, part: BinaryIO, limit: int) -> str:
  """Request the missing bytes once and append them. Returns the server's MD5 in hexadecimal, or ''.

  Raises ConnectionError if bytes are missing at the end.
  """
  etag = read_etag(part)
  offset = downloaded_bytes(part) if etag else 0
  headers = {'User-Agent': 'vit_jax', 'Accept-Encoding': 'identity'}
  if offset:
    headers |= {'Range': f'bytes={offset}-', 'If-Range': etag}
  request = urllib.request.Request(quote_url(url), headers=headers)
  with open_url(request, timeout=READ_TIMEOUT) as response:
    if response.headers.get_content_type() == 'text/html':
      raise UserError(f'{url} is a web page, not an array file')
    offset = offset if response.status == 206 else 0
    if offset and not is_continuation(response.headers, offset, etag):
      part.truncate(0)
      raise ConnectionError(f'the response does not continue at byte {offset:,}')
    length = response.headers.get('Content-Length')
    total = offset + int(length) if length and length.isdecimal() else None
    check_limit(url, total or 0, limit)
    if not offset:
      part.truncate(0)
      etag_path(part).write_text(response.headers.get('ETag') or '', encoding='utf-8')
    append_chunks(url, part, iter(lambda: response.read1(DOWNLOAD_CHUNK), b''), total, limit)
  if total is not None and downloaded_bytes(part) < total:
    raise ConnectionError(f'received {downloaded_bytes(part):,} of {total:,} bytes')
  # Servers send one header per digest, or one for all.
  return parse_md5_header(','.join(response.headers.get_all('x-goog-hash', [])))


def append_chunks(url: str, part: BinaryIO, chunks: Iterator[bytes], total: int | None, limit: int):
  """Append chunks to the partial file, with a progress bar up to `total` bytes.

  Raises UserError if the file becomes longer than `limit` bytes, or if the server is too slow.
  """
  received, rate = downloaded_bytes(part), RateLimit(url)
  with progress_bar(url, received, total) as progress:
    for data in chunks:
      received += len(data)
      if received > limit:
        part.truncate(0)
        check_limit(url, received, limit)
      part.write(data)
      progress.update(len(data))
      rate.add(len(data))


def check_limit(url: str, count: int, limit: int):
  """Raise UserError if a file of `count` bytes is longer than `limit` bytes."""
  if count > limit:
    raise UserError(
      f'{url}: the server sends {count:,} bytes or more, but the file can have at most {limit:,}'
    )


def read_etag(part: BinaryIO) -> str:
  """Return the stored ETag, or '' if it is missing, damaged, or weak.

  HTTP does not allow a weak ETag in If-Range.
  """
  path = etag_path(part)
  etag = path.read_text(errors='replace', encoding='utf-8') if path.exists() else ''
  return etag if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag) else ''


def quote_url(url: str) -> str:
  """Percent-encode spaces and non-ASCII characters, and leave existing escapes unchanged."""
  return urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")


def is_continuation(headers: http.client.HTTPMessage, offset: int, etag: str) -> bool:
  """Return whether a response continues the same version of the file at `offset`, up to its end."""
  match = re.fullmatch(r'bytes (\d+)-(\d+)/(\d+|\*)', headers.get('Content-Range') or '')
  if not match or headers.get('ETag', etag) != etag:
    return False
  first, last, total = match.groups()
  return int(first) == offset and total in ('*', str(int(last) + 1))


def progress_bar(url: str, initial: int, total: int | None) -> tqdm:
  """Return a progress bar in bytes, which is shown only on a terminal."""
  return tqdm(
    desc=url.rpartition('/')[2],
    initial=initial,
    total=total,
    unit='B',
    unit_scale=True,
    disable=not sys.stderr.isatty(),
  )


def parse_md5_header(header: str) -> str:
  """Return the MD5 in Google's header 'crc32c=…,md5=…' in hexadecimal, or ''."""
  match = re.search(r'md5=([\w+/]{22}==)', header)
  return base64.b64decode(match[1]).hex() if match else ''


def download_fsspec(url: str, part: BinaryIO, limit: int) -> str:
  """Download a URL of another scheme, such as gs://, from the start.

  fsspec's libraries retry. Returns '', because no digest is known.
  """
  part.truncate(0)
  append_chunks(url, part, read_fsspec_chunks(url), None, limit)
  return ''


def read_fsspec_chunks(url: str) -> Iterator[bytes]:
  """Yield the bytes that fsspec reads.

  Raises UserError for any failure, because fsspec's libraries raise many unrelated exceptions.
  """
  import fsspec

  try:
    with fsspec.open(url, 'rb') as source:
      received = 0
      while data := source.read(DOWNLOAD_CHUNK):
        received += len(data)
        yield data
      if received != (getattr(source, 'size', None) or received):
        raise ConnectionError(f'received {received:,} of {source.size:,} bytes')
  except ImportError as error:
    needs_gcsfs = "needs gcsfs: pip install 'vit-jax[gcp]'"
    problem = needs_gcsfs if url.startswith('gs://') else f'is not readable: {error}'
    raise UserError(f'{url} {problem}{public_bucket_hint(url)}') from None
  except FileNotFoundError:
    raise UserError(f'{url}: the file does not exist') from None
  except Exception as error:
    problem = ' '.join(str(error).split()) or type(error).__name__
    raise UserError(f'{url}: {problem}{public_bucket_hint(url)}') from None


def public_bucket_hint(url: str) -> str:
  """Return the https URL at which public buckets are readable without an account, or ''."""
  scheme, _, rest = url.partition('://')
  if scheme != 'gs':
    return ''
  return f'; public buckets are also at https://storage.googleapis.com/{rest}'


def check_content(url: str, part: BinaryIO, size: str, md5: str):
  """Check a complete download.

  Raises UserError, and deletes the partial content, if it is empty, a web page, or of the wrong
  size or MD5.
  """
  actual = downloaded_bytes(part)
  problem = '' if actual else 'the file is empty'
  if size and not matches_published_size(actual, size):
    problem = f'the file {describe_wrong_size(actual, size)}'
  part.seek(0)
  if part.read(512).removeprefix(b'\xef\xbb\xbf').lstrip()[:1] == b'<':
    problem = 'the file is a web page, not an array file'
  part.seek(0)
  if md5 and not problem and hashlib.file_digest(part, 'md5').hexdigest() != md5.lower():
    problem = f'the MD5 of the file is not {md5}'
  if problem:
    part.truncate(0)
    etag_path(part).unlink(missing_ok=True)
    raise UserError(f'{url}: {problem}')


def offline_error(url: str, path: Path, size: str, error: Exception) -> UserError:
  """Return the error for an unreachable server, which explains how to add the file by hand."""
  reason = getattr(error, 'reason', error)
  if isinstance(reason, OSError) and not isinstance(reason, socket.gaierror) and reason.strerror:
    reason = reason.strerror
  of_size = f' ({size})' if size else ''
  return UserError(
    f'cannot download {url} ({reason}): '
    f'download it on another machine{of_size} and put it at {path}'
  )
