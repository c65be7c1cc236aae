"""Downloads from a local server that simulates interruptions, changes and errors of a bucket."""

import base64
import contextlib
import hashlib
import http.server
import os
import resource
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.pretrained import download, http_safety
from vit_jax.pretrained.download import cache_path, fetch
from vit_jax.pretrained.published_size import matches_published_size

DATA = b'PK\x03\x04' + np.random.default_rng(0).bytes(3_000_000)
OTHER = b'PK\x03\x04' + bytes(len(DATA) - 4)
MD5 = hashlib.md5(DATA).hexdigest()


class Bucket(http.server.BaseHTTPRequestHandler):
  """Respond as the first part of the path says. `server.ranges` lists the Range of each request."""

  protocol_version = 'HTTP/1.1'

  def do_GET(self):
    server, name = self.server, self.path.strip('/').split('/')[0]
    server.ranges.append(self.headers.get('Range'))
    count = len(server.ranges)
    if name == '404':
      return self.answer(404, b'Not Found')
    if name == 'busy' and count < 3:
      return self.answer(503, b'Service Unavailable')
    if name == 'down':
      return self.answer(500, b'Internal Server Error')
    if name == 'page':
      return self.answer(200, b'<html>Sign in</html>', {'Content-Type': 'text/html'})
    if name == 'hidden_page':
      return self.answer(200, b'\xef\xbb\xbf\n<!DOCTYPE html><html>Sign in</html>')
    if name == 'drip':
      return self.drip()
    if name == 'to_private':
      return self.answer(
        302, b'', {'Location': f'http://127.0.0.1:{server.server_port}/fine/f.npz'}
      )
    if name == 'to_ftp':
      return self.answer(302, b'', {'Location': 'ftp://example.com/f.npz'})
    if name == 'endless':
      return self.endless()
    if name == 'empty':
      return self.answer(200, b'')
    if name == 'circle':
      return self.answer(302, b'', {'Location': self.path})
    if name == 'redirect' and 'there' not in self.path:
      return self.answer(302, b'', {'Location': '/redirect/there/file.npz'})
    data, tag = DATA, '"one"'
    if name in ('changed', 'changed_mutely') and count > 1:
      data, tag = OTHER, '"two"'
    hashed = base64.b64encode(
      hashlib.md5(b'another' if name == 'digest' else data).digest()
    ).decode()
    headers = {'x-goog-hash': f'crc32c=AAAAAA==,md5={hashed}'} | (
      {} if name == 'untagged' else {'ETag': tag}
    )
    begin = 0
    if (
      self.headers.get('Range')
      and name != 'no_ranges'
      and (name == 'changed_mutely' or self.headers.get('If-Range') == tag)
    ):
      begin = int(self.headers['Range'].removeprefix('bytes=').removesuffix('-'))
      begin += 1000 * (name == 'elsewhere' and count == 2)
      headers |= {'Content-Range': f'bytes {begin}-{len(data) - 1}/{len(data)}'}
    return self.answer(206 if begin else 200, data[begin:], headers, **self.damage(name, count))

  def drip(self):
    self.send_response(200)
    self.end_headers()
    with contextlib.suppress(OSError):
      while True:
        self.wfile.write(b'P')
        threading.Event().wait(0.05)

  def endless(self):
    self.send_response(200)
    self.end_headers()
    self.server.sent = 0
    with contextlib.suppress(OSError):
      while self.server.sent < 200 * 2**20:
        self.wfile.write(bytes(2**20))
        self.server.sent += 2**20

  def damage(self, name: str, count: int) -> dict:
    if (
      name in ('interrupted', 'changed', 'changed_mutely', 'no_ranges', 'untagged', 'elsewhere')
      and count <= 2
    ):
      return {'stop': 700_000}
    return (
      {'stop': 0 if name == 'never' else 500_000}
      if name in ('never', 'often')
      else {'slow': name == 'slow'}
    )

  def answer(
    self,
    status: int,
    body: bytes,
    headers: dict | None = None,
    *,
    stop: int | None = None,
    slow: bool = False,
  ):
    self.send_response(status)
    for key, value in {
      'Content-Type': 'application/octet-stream',
      'Content-Length': str(len(body)),
      **(headers or {}),
    }.items():
      for line in (
        value.split(',') if key == 'x-goog-hash' else [value]
      ):  # Google sends one header per digest.
        self.send_header(key, line)
    self.end_headers()
    if slow:
      for at in range(0, len(body), 100_000):
        self.wfile.write(body[at : at + 100_000])
        self.wfile.flush()
        threading.Event().wait(0.02)
    else:
      self.wfile.write(body[:stop])
    if stop is not None:
      self.close_connection = True

  def log_message(self, *args):
    pass


@pytest.fixture
def bucket(monkeypatch):
  monkeypatch.setattr(download, 'FIRST_RETRY_WAIT', 0.001)
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Bucket)
  server.ranges, server.url = [], f'http://127.0.0.1:{server.server_port}'
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  yield server
  server.shutdown()
  server.server_close()


GOOD = {
  # Behaviour of the server: number of requests.
  'fine': 1, 'slow': 1, 'redirect': 2, 'interrupted': 3, 'often': 6 + 1, 'busy': 3,
  'no_ranges': 3, 'untagged': 3,
  'elsewhere': 3, 'a name, ü': 1,
}  # fmt: skip


@pytest.mark.parametrize('behaviour', GOOD)
def test_the_complete_file_is_downloaded(bucket, tmp_path, behaviour):
  path = fetch(f'{bucket.url}/{behaviour}/file.npz', directory=tmp_path)
  assert path.read_bytes() == DATA
  assert len(bucket.ranges) == GOOD[behaviour]
  assert [left.name for left in path.parent.iterdir()] == ['file.npz']  # No partial files.


def test_a_retry_requests_only_the_missing_bytes(bucket, tmp_path):
  fetch(f'{bucket.url}/interrupted/file.npz', directory=tmp_path)
  assert bucket.ranges == [None, 'bytes=700000-', 'bytes=1400000-']


def test_a_later_process_resumes_an_interrupted_download(bucket, tmp_path):
  path = cache_path(f'{bucket.url}/fine/file.npz', tmp_path)
  path.parent.mkdir(parents=True)
  path.with_name('file.npz.part').write_bytes(DATA[:1_000_000])
  path.with_name('file.npz.etag').write_text('"one"', encoding='utf-8')
  assert fetch(f'{bucket.url}/fine/file.npz', directory=tmp_path).read_bytes() == DATA
  assert bucket.ranges == ['bytes=1000000-']


@pytest.mark.parametrize('behaviour', ['slow', 'interrupted'])
def test_concurrent_threads_download_a_file_once(bucket, tmp_path, behaviour):
  url = f'{bucket.url}/{behaviour}/file.npz'
  with ThreadPoolExecutor(6) as pool:
    paths = list(pool.map(lambda _: fetch(url, directory=tmp_path), range(6)))
  assert {path.read_bytes() == DATA for path in paths} == {True}
  assert len(bucket.ranges) == GOOD[behaviour]
  assert [left.name for left in paths[0].parent.iterdir()] == ['file.npz']


def test_a_second_process_waits_for_the_first(bucket, tmp_path):
  url = f'{bucket.url}/slow/file.npz'
  code = 'import sys; from vit_jax.pretrained.download import fetch; fetch(sys.argv[1])'
  environment = os.environ | {'VIT_JAX_CACHE': str(tmp_path)}
  with subprocess.Popen([sys.executable, '-c', code, url], env=environment) as other:
    while not bucket.ranges and other.poll() is None:
      threading.Event().wait(0.01)
    assert fetch(url, directory=tmp_path).read_bytes() == DATA
    assert other.wait() == 0
  assert len(bucket.ranges) == 1


@pytest.mark.parametrize('behaviour', ['changed', 'changed_mutely'])
def test_two_versions_of_a_file_are_not_joined(bucket, tmp_path, behaviour):
  assert fetch(f'{bucket.url}/{behaviour}/file.npz', directory=tmp_path).read_bytes() == OTHER


def test_a_cached_file_is_not_downloaded_again(bucket, tmp_path):
  for _ in range(2):
    fetch(f'{bucket.url}/fine/file.npz', directory=tmp_path)
  assert len(bucket.ranges) == 1


def test_a_file_of_the_published_size_and_digest_is_accepted(bucket, tmp_path):
  assert (
    fetch(
      f'{bucket.url}/fine/file.npz', size='2.86 MiB', md5=MD5.upper(), directory=tmp_path
    ).read_bytes()
    == DATA
  )


BAD = {
  # Behaviour of the server: (expectations, part of the message).
  '404': ({}, '404'),
  'page': ({}, 'is a web page'),
  'hidden_page': ({}, 'is a web page'),
  'digest': ({}, 'MD5'),
  'empty': ({}, 'empty'),
  'circle': ({}, '302 .* infinite loop'),
  'fine': (
    {'size': '3.86 MiB'},
    r'3,000,004 bytes \(2.86 MiB\).* 3.86 MiB',
  ),
  'slow': ({'md5': '0' * 32}, 'MD5.* 0000'),
  'never': (
    {'size': '2.86 MiB'},
    r'0 of 3,000,004 bytes.*\(2.86 MiB\).*file.npz',
  ),
  'down': ({}, 'put it at .*file.npz'),
}


@pytest.mark.parametrize('behaviour', BAD)
def test_a_failed_download_raises_one_line_and_leaves_no_file(bucket, tmp_path, behaviour):
  expectations, message = BAD[behaviour]
  with pytest.raises(UserError, match=message) as error:
    fetch(f'{bucket.url}/{behaviour}/file.npz', directory=tmp_path, **expectations)
  assert '\n' not in str(error.value)
  assert not [path for path in tmp_path.rglob('*.npz') if path.is_file()]


def test_a_404_is_not_retried(bucket, tmp_path):
  with pytest.raises(UserError):
    fetch(f'{bucket.url}/404/file.npz', directory=tmp_path)
  assert len(bucket.ranges) == 1


def test_the_offline_error_says_where_to_put_the_file(monkeypatch, tmp_path):
  monkeypatch.setattr(download, 'FIRST_RETRY_WAIT', 0.001)
  with socket.socket() as unused:
    unused.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{unused.getsockname()[1]}/models/file.npz'
    with pytest.raises(UserError) as error:
      fetch(url, size='1.2 GiB', directory=tmp_path)
  expected = tmp_path / url.split('/')[2] / 'models' / 'file.npz'
  parts = (url, '(Connection refused)', '(1.2 GiB)', f'put it at {expected}')
  assert all(part in str(error.value) for part in parts)
  expected.write_bytes(DATA)
  with pytest.raises(UserError, match=r'3,000,004 bytes .*1.2 GiB.*delete it'):
    fetch(url, size='1.2 GiB', directory=tmp_path)
  assert fetch(url, size='2.86 MiB', directory=tmp_path) == expected


@pytest.mark.parametrize('tag', [b'W/"one"', b'\xff\n\r: ', b''])
def test_a_partial_file_of_unknown_version_is_discarded(bucket, tmp_path, tag):
  path = cache_path(f'{bucket.url}/fine/file.npz', tmp_path)
  path.parent.mkdir(parents=True)
  path.with_name('file.npz.part').write_bytes(OTHER[:1_000_000])
  path.with_name('file.npz.etag').write_bytes(tag)
  assert fetch(f'{bucket.url}/fine/file.npz', directory=tmp_path).read_bytes() == DATA
  assert bucket.ranges == [None]


def test_every_scheme_of_fsspec_is_downloaded(tmp_path):
  with fsspec.open('memory://bucket/models/file.npz', 'wb') as out:
    out.write(DATA)
  assert fetch('memory://bucket/models/file.npz', md5=MD5, directory=tmp_path).read_bytes() == DATA
  with pytest.raises(UserError, match='file.* does not exist'):
    fetch('memory://bucket/models/other.npz', directory=tmp_path)
  with pytest.raises(UserError, match='bogus'):
    fetch('bogus://bucket/models/other.npz', directory=tmp_path)


def test_a_bucket_without_its_library_names_the_extra(tmp_path):
  try:
    import gcsfs  # noqa: F401
  except ImportError:
    with pytest.raises(
      UserError,
      match=r"pip install 'vit-jax\[gcp\]'.*https://storage.googleapis.com/vit_models/sam/ViT-B_16.npz",
    ):
      fetch('gs://vit_models/sam/ViT-B_16.npz', directory=tmp_path)


class Forbidden(fsspec.AbstractFileSystem):
  """A bucket that must not be read. Libraries raise different exceptions for this."""

  protocol = 'forbidden'

  def _open(self, path, **kwargs):
    raise {
      'one': PermissionError(13, 'Forbidden'),
      'two': RuntimeError('no access,\nsays the library'),
    }[path.split('/')[0]]


def test_a_refusal_by_the_bucket_is_not_reported_as_a_disk_error(tmp_path):
  fsspec.register_implementation('forbidden', Forbidden, clobber=True)
  for bucket_name, message in (('one', 'Forbidden'), ('two', 'no access, says the library')):
    url = f'forbidden://{bucket_name}/file.npz'
    with pytest.raises(UserError, match=f'^{url}: .*{message}$'):
      fetch(url, directory=tmp_path)
  assert not [path for path in tmp_path.rglob('*') if path.is_file()]


def test_a_file_url_returns_the_file_uncopied(tmp_path):
  path = tmp_path / 'a model.npz'
  path.write_bytes(b'PK')
  assert fetch(f'file://{tmp_path}/a%20model.npz', directory=tmp_path / 'cache') == path
  with pytest.raises(UserError, match='file.* does not exist'):
    fetch(f'file://{tmp_path}/none.npz', directory=tmp_path)


@pytest.mark.parametrize(
  'url',
  [
    'https://host/../../etc/passwd',
    'https://host/%2e%2e/%2e%2e/up.npz',
    'https://host/a/',
    'https://host',
    'https:///x',
    'https://../x',
  ],
)
def test_no_url_has_a_path_outside_the_cache(tmp_path, url):
  with pytest.raises(UserError, match='name a file'):
    cache_path(url, tmp_path)


def test_files_of_the_same_name_have_different_cache_paths(tmp_path):
  one, two = (
    cache_path(f'https://host/vit_models/{folder}/ViT-B_16.npz', tmp_path)
    for folder in ('sam', 'imagenet21k%2Bimagenet2012')
  )
  assert one == tmp_path / 'host' / 'vit_models' / 'sam' / 'ViT-B_16.npz'
  assert two == tmp_path / 'host' / 'vit_models' / 'imagenet21k+imagenet2012' / 'ViT-B_16.npz'


def test_port_query_and_scheme_are_part_of_the_cache_path():
  urls = (
    'https://host/m.npz', 'https://host:8080/m.npz', 'https://host/m.npz?file=a',
    'https://host/m.npz?file=b', 'gs://host/m.npz',
    's3://host/m.npz',
  )  # fmt: skip
  assert len({cache_path(url, Path('cache')) for url in urls}) == len(urls)
  assert cache_path('https://me:secret@host/m.npz', Path('cache')) == Path('cache/host/m.npz')


def test_an_invalid_url_raises_one_line(bucket, tmp_path):
  for url in ('http://[::1/x/file.npz', 'http://host:port/x/file.npz'):
    with pytest.raises(UserError, match='not a URL'):
      fetch(url, directory=tmp_path)


def test_a_full_disk_is_not_retried(bucket, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
  try:
    with pytest.raises(UserError, match='File too large; set VIT_JAX_CACHE'):
      fetch(f'{bucket.url}/fine/file.npz', directory=tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert len(bucket.ranges) == 1


def test_an_unwritable_cache_raises_one_line(bucket, tmp_path):
  (tmp_path / 'file').write_text('', encoding='utf-8')
  with pytest.raises(UserError, match='set VIT_JAX_CACHE'):
    fetch(f'{bucket.url}/fine/file.npz', directory=tmp_path / 'file')


def test_a_size_matches_to_its_printed_precision():
  assert matches_published_size(round(393.69 * 2**20), '393.69 MiB')
  assert not matches_published_size(round(393.60 * 2**20), '393.69 MiB')
  assert matches_published_size(round(1.224 * 2**30), '1.22 GiB')
  assert matches_published_size(391 * 2**20 + 400_000, '391 MiB')
  assert not matches_published_size(393 * 2**20, '391 MiB')


def test_the_published_size_bounds_what_is_written(bucket, tmp_path):
  with pytest.raises(UserError, match='at most 1,054,867'):
    fetch(f'{bucket.url}/fine/file.npz', size='1.00 MiB', directory=tmp_path)  # Content-Length.
  with pytest.raises(UserError, match='at most'):
    fetch(f'{bucket.url}/endless/file.npz', size='1.00 MiB', directory=tmp_path)
  assert bucket.sent < 100 * 2**20
  assert [path for path in tmp_path.rglob('*') if path.is_file() and path.stat().st_size] == []


def test_a_server_that_drips_bytes_is_given_up(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(http_safety, 'SLOW_SECONDS', 0.3)
  with pytest.raises(UserError, match='the download resumes'):
    fetch(f'{bucket.url}/drip/file.npz', directory=tmp_path)


def test_a_redirect_from_a_public_host_to_a_private_address_is_not_followed(
  bucket, tmp_path, monkeypatch
):
  public = bucket.url.replace('127.0.0.1', 'localhost')
  addresses = {'localhost': {'8.8.8.8'}, '127.0.0.1': {'127.0.0.1'}}
  monkeypatch.setattr(http_safety, 'resolve', addresses.get)
  with pytest.raises(UserError, match='redirects to 127.0.0.1'):
    fetch(f'{public}/to_private/file.npz', directory=tmp_path)
  with pytest.raises(UserError, match='ftp://'):
    fetch(f'{public}/to_ftp/file.npz', directory=tmp_path)
  # A private address that the user names may redirect to another.
  assert fetch(f'{bucket.url}/to_private/file.npz', directory=tmp_path).read_bytes() == DATA


@pytest.mark.parametrize(
  ('address', 'private'),
  [
    ('127.0.0.1', True), ('10.1.2.3', True), ('192.168.0.1', True), ('169.254.169.254', True),
    ('::1', True), ('fe80::1', True), ('8.8.8.8', False), ('2001:4860:4860::8888', False),
  ],
)  # fmt: skip
def test_private_addresses_are_recognized(address, private):
  assert http_safety.is_private_host(address) == private


def test_a_name_that_is_too_long_for_the_file_system_is_replaced(bucket, tmp_path):
  names = [letter * 300 + '.npz' for letter in 'ab']
  paths = [fetch(f'{bucket.url}/fine/{name}', directory=tmp_path) for name in names]
  assert paths[0] != paths[1]
  assert all(path.suffix == '.npz' and path.read_bytes() == DATA for path in paths)


@pytest.mark.parametrize(
  'url', ['http://me:secret@127.0.0.1:1/x.npz', 'memory://me:secret@h/x.npz']
)
def test_messages_do_not_show_passwords(tmp_path, monkeypatch, url):
  monkeypatch.setattr(download, 'FIRST_RETRY_WAIT', 0.001)
  with pytest.raises(UserError) as error:
    fetch(url, directory=tmp_path)
  assert 'secret' not in str(error.value) and '***@' in str(error.value)
