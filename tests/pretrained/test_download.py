"""A server on this machine stands for the bucket, and behaves as badly as one can."""

import base64
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
from vit_jax.pretrained import download
from vit_jax.pretrained.download import cache_path, fetch, matches_published_size

DATA = b'PK\x03\x04' + np.random.default_rng(0).bytes(3_000_000)
OTHER = b'PK\x03\x04' + bytes(len(DATA) - 4)
MD5 = hashlib.md5(DATA).hexdigest()


class Bucket(http.server.BaseHTTPRequestHandler):
  """Answers by the behaviour that the path names; `asked` keeps every request's Range."""

  protocol_version = 'HTTP/1.1'

  def do_GET(self):
    server, name = self.server, self.path.strip('/').split('/')[0]
    server.asked.append(self.headers.get('Range'))
    count = len(server.asked)
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
      ):  # Google sends one for each digest.
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
  server.asked, server.url = [], f'http://127.0.0.1:{server.server_port}'
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  yield server
  server.shutdown()
  server.server_close()


GOOD = {
  # How the server behaves: how many requests it then takes.
  'fine': 1, 'slow': 1, 'redirect': 2, 'interrupted': 3, 'often': 6 + 1, 'busy': 3, 'no_ranges': 3, 'untagged': 3,
  'elsewhere': 3, 'a name, ü': 1,
}  # fmt: skip


@pytest.mark.parametrize('behaviour', GOOD)
def test_the_whole_file_arrives(bucket, tmp_path, behaviour):
  path = fetch(f'{bucket.url}/{behaviour}/file.npz', directory=tmp_path)
  assert path.read_bytes() == DATA
  assert len(bucket.asked) == GOOD[behaviour]
  assert [left.name for left in path.parent.iterdir()] == ['file.npz']  # No parts.


def test_what_has_come_is_not_asked_for_again(bucket, tmp_path):
  fetch(f'{bucket.url}/interrupted/file.npz', directory=tmp_path)
  assert bucket.asked == [None, 'bytes=700000-', 'bytes=1400000-']


def test_a_later_process_goes_on_where_an_interrupted_one_stopped(bucket, tmp_path):
  path = cache_path(f'{bucket.url}/fine/file.npz', tmp_path)
  path.parent.mkdir(parents=True)
  path.with_name('file.npz.part').write_bytes(DATA[:1_000_000])
  path.with_name('file.npz.etag').write_text('"one"')
  assert fetch(f'{bucket.url}/fine/file.npz', directory=tmp_path).read_bytes() == DATA
  assert bucket.asked == ['bytes=1000000-']


@pytest.mark.parametrize('behaviour', ['slow', 'interrupted'])
def test_of_many_that_want_one_file_one_fetches_it(bucket, tmp_path, behaviour):
  url = f'{bucket.url}/{behaviour}/file.npz'
  with ThreadPoolExecutor(6) as pool:
    paths = list(pool.map(lambda _: fetch(url, directory=tmp_path), range(6)))
  assert {path.read_bytes() == DATA for path in paths} == {True}
  assert len(bucket.asked) == GOOD[behaviour]
  assert [left.name for left in paths[0].parent.iterdir()] == ['file.npz']


def test_another_process_waits_for_the_one_that_fetches(bucket, tmp_path):
  url = f'{bucket.url}/slow/file.npz'
  code = 'import sys; from vit_jax.pretrained.download import fetch; fetch(sys.argv[1])'
  environment = os.environ | {'VIT_JAX_CACHE': str(tmp_path)}
  with subprocess.Popen([sys.executable, '-c', code, url], env=environment) as other:
    while not bucket.asked and other.poll() is None:
      threading.Event().wait(0.01)
    assert fetch(url, directory=tmp_path).read_bytes() == DATA
    assert other.wait() == 0
  assert len(bucket.asked) == 1


@pytest.mark.parametrize('behaviour', ['changed', 'changed_mutely'])
def test_a_file_that_changes_between_two_requests_is_not_glued_together(
  bucket, tmp_path, behaviour
):
  assert fetch(f'{bucket.url}/{behaviour}/file.npz', directory=tmp_path).read_bytes() == OTHER


def test_a_file_that_is_there_is_not_fetched(bucket, tmp_path):
  for _ in range(2):
    fetch(f'{bucket.url}/fine/file.npz', directory=tmp_path)
  assert len(bucket.asked) == 1


def test_the_published_size_and_digest_are_checked(bucket, tmp_path):
  assert (
    fetch(
      f'{bucket.url}/fine/file.npz', size='2.86 MiB', md5=MD5.upper(), directory=tmp_path
    ).read_bytes()
    == DATA
  )


BAD = {
  # How the server behaves, and what is asked of the file: what the error says.
  '404': ({}, 'the server says 404'),
  'page': ({}, 'is a web page'),
  'hidden_page': ({}, 'is a web page'),
  'digest': ({}, 'its MD5 is not'),
  'empty': ({}, 'it is empty'),
  'circle': ({}, 'the server says 302 .* infinite loop'),
  'fine': (
    {'size': '3.86 MiB'},
    r'it has 3,000,004 bytes \(2.86 MiB\), and 3.86 MiB were published',
  ),
  'slow': ({'md5': '0' * 32}, 'its MD5 is not 0000'),
  'never': (
    {'size': '2.86 MiB'},
    r'only 0 of 3,000,004 bytes came.* \(2.86 MiB\) and put it at .*file.npz',
  ),
  'down': ({}, 'get it on another machine and put it at'),
}


@pytest.mark.parametrize('behaviour', BAD)
def test_what_can_not_be_had_whole_is_one_line_and_leaves_no_file(bucket, tmp_path, behaviour):
  asked, message = BAD[behaviour]
  with pytest.raises(UserError, match=message) as error:
    fetch(f'{bucket.url}/{behaviour}/file.npz', directory=tmp_path, **asked)
  assert '\n' not in str(error.value)
  assert not [path for path in tmp_path.rglob('*.npz') if path.is_file()]


def test_a_404_is_not_tried_again(bucket, tmp_path):
  with pytest.raises(UserError):
    fetch(f'{bucket.url}/404/file.npz', directory=tmp_path)
  assert len(bucket.asked) == 1


def test_offline_the_error_says_which_file_to_put_where(monkeypatch, tmp_path):
  monkeypatch.setattr(download, 'FIRST_RETRY_WAIT', 0.001)
  with socket.socket() as unused:
    unused.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{unused.getsockname()[1]}/models/file.npz'
    with pytest.raises(UserError) as error:
      fetch(url, size='1.2 GiB', directory=tmp_path)
  expected = tmp_path / url.split('/')[2] / 'models' / 'file.npz'
  assert str(error.value) == (
    f'can not fetch {url} (Connection refused): get it on another machine (1.2 GiB) and put it at {expected}'
  )
  expected.write_bytes(DATA)
  with pytest.raises(
    UserError, match=r'has 3,000,004 bytes .*, and 1.2 GiB were published: delete it'
  ):
    fetch(url, size='1.2 GiB', directory=tmp_path)
  assert fetch(url, size='2.86 MiB', directory=tmp_path) == expected


@pytest.mark.parametrize('tag', [b'W/"one"', b'\xff\n\r: ', b''])
def test_what_came_of_an_unknown_version_is_not_gone_on_with(bucket, tmp_path, tag):
  path = cache_path(f'{bucket.url}/fine/file.npz', tmp_path)
  path.parent.mkdir(parents=True)
  path.with_name('file.npz.part').write_bytes(OTHER[:1_000_000])
  path.with_name('file.npz.etag').write_bytes(tag)
  assert fetch(f'{bucket.url}/fine/file.npz', directory=tmp_path).read_bytes() == DATA
  assert bucket.asked == [None]


def test_any_scheme_that_fsspec_knows_is_read(tmp_path):
  with fsspec.open('memory://bucket/models/file.npz', 'wb') as out:
    out.write(DATA)
  assert fetch('memory://bucket/models/file.npz', md5=MD5, directory=tmp_path).read_bytes() == DATA
  with pytest.raises(UserError, match='there is no such file'):
    fetch('memory://bucket/models/other.npz', directory=tmp_path)
  with pytest.raises(UserError, match='bogus'):
    fetch('bogus://bucket/models/other.npz', directory=tmp_path)


def test_a_bucket_without_its_library_names_what_to_install(tmp_path):
  try:
    import gcsfs  # noqa: F401
  except ImportError:
    with pytest.raises(
      UserError,
      match=r"pip install 'vit-jax\[gcp\]'.*https://storage.googleapis.com/vit_models/sam/ViT-B_16.npz",
    ):
      fetch('gs://vit_models/sam/ViT-B_16.npz', directory=tmp_path)


class Forbidden(fsspec.AbstractFileSystem):
  """A bucket that may not be read; each library says so by an exception of its own."""

  protocol = 'forbidden'

  def _open(self, path, **kwargs):
    raise {
      'one': PermissionError(13, 'Forbidden'),
      'two': RuntimeError('no access,\nsays the library'),
    }[path.split('/')[0]]


def test_what_a_bucket_refuses_is_not_blamed_on_the_disk(tmp_path):
  fsspec.register_implementation('forbidden', Forbidden, clobber=True)
  for bucket_name, message in (('one', 'Forbidden'), ('two', 'no access, says the library')):
    url = f'forbidden://{bucket_name}/file.npz'
    with pytest.raises(UserError, match=f'^{url}: .*{message}$'):
      fetch(url, directory=tmp_path)
  assert not [path for path in tmp_path.rglob('*') if path.is_file()]


def test_a_file_url_is_the_file_itself(tmp_path):
  path = tmp_path / 'a model.npz'
  path.write_bytes(b'PK')
  assert fetch(f'file://{tmp_path}/a%20model.npz', directory=tmp_path / 'cache') == path
  with pytest.raises(UserError, match='there is no such file'):
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
def test_no_url_leads_out_of_the_cache(tmp_path, url):
  with pytest.raises(UserError, match='names no file'):
    cache_path(url, tmp_path)


def test_two_files_of_one_name_have_two_places(tmp_path):
  one, two = (
    cache_path(f'https://host/vit_models/{folder}/ViT-B_16.npz', tmp_path)
    for folder in ('sam', 'imagenet21k%2Bimagenet2012')
  )
  assert one == tmp_path / 'host' / 'vit_models' / 'sam' / 'ViT-B_16.npz'
  assert two == tmp_path / 'host' / 'vit_models' / 'imagenet21k+imagenet2012' / 'ViT-B_16.npz'


def test_what_tells_two_files_apart_is_in_their_places():
  urls = (
    'https://host/m.npz', 'https://host:8080/m.npz', 'https://host/m.npz?file=a', 'https://host/m.npz?file=b', 'gs://host/m.npz',
    's3://host/m.npz',
  )  # fmt: skip
  assert len({cache_path(url, Path('cache')) for url in urls}) == len(urls)
  assert cache_path('https://me:secret@host/m.npz', Path('cache')) == Path('cache/host/m.npz')


def test_what_is_no_url_is_one_line_at_once(bucket, tmp_path):
  for url in ('http://[::1/x/file.npz', 'http://host:port/x/file.npz'):
    with pytest.raises(UserError, match='is no URL'):
      fetch(url, directory=tmp_path)


def test_a_full_disk_is_not_taken_for_a_network(bucket, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
  try:
    with pytest.raises(UserError, match='can not write .*: File too large; set VIT_JAX_CACHE'):
      fetch(f'{bucket.url}/fine/file.npz', directory=tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert len(bucket.asked) == 1


def test_a_cache_that_can_not_be_written_is_one_line(bucket, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='can not write .* set VIT_JAX_CACHE'):
    fetch(f'{bucket.url}/fine/file.npz', directory=tmp_path / 'file')


def test_a_size_fits_to_the_precision_that_is_printed():
  assert matches_published_size(round(393.69 * 2**20), '393.69 MiB')
  assert not matches_published_size(round(393.60 * 2**20), '393.69 MiB')
  assert matches_published_size(round(1.224 * 2**30), '1.22 GiB')
  assert matches_published_size(391 * 2**20 + 400_000, '391 MiB')
  assert not matches_published_size(393 * 2**20, '391 MiB')
