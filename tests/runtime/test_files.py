"""Small files: written whole or not at all, tried again where storage fails, and read within bounds."""

import errno
import os
import time

import pytest

from vit_jax.errors import StorageError, UserError
from vit_jax.runtime import files
from vit_jax.runtime.files import (
  explain_write_errors,
  read_json_object,
  read_text_file,
  retry_io,
  write_atomically,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(files, 'RETRY_DELAYS', (0.01, 0.02, 0.04))


def failing(times: int, code: int):
  left = [times]

  def function():
    left[0] -= 1
    if left[0] >= 0:
      raise OSError(code, os.strerror(code))
    return 'done'

  return function


@pytest.mark.parametrize(
  'code', [errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY]
)
def test_storage_may_fail_three_times_and_not_four(code):
  assert retry_io('reading x', failing(3, code)) == 'done'
  with pytest.raises(StorageError, match=f'reading x: {os.strerror(code)}, 4 times'):
    retry_io('reading x', failing(4, code))


def test_what_does_not_go_away_is_not_waited_for():
  began = time.monotonic()
  with pytest.raises(FileNotFoundError):
    retry_io('reading x', failing(1, errno.ENOENT))
  with (
    pytest.raises(
      UserError, match='can not write to here: Read-only file system; choose another --workdir'
    ),
    explain_write_errors('here'),
  ):
    retry_io('writing x', failing(1, errno.EROFS))
  assert time.monotonic() - began < 5


def test_a_file_is_replaced_as_a_whole(tmp_path):
  write_atomically(tmp_path / 'x', 'one')
  write_atomically(tmp_path / 'x', 'two')
  assert read_text_file(tmp_path / 'x') == 'two'
  assert [path.name for path in tmp_path.iterdir()] == ['x']


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'is no JSON'),
    (b'{"a": 1', 'is no JSON'),
    (b'[' * 100000, 'is no JSON'),
    (b'[1]', 'holds list, and a JSON object is expected'),
    (b'\xff\xfe', 'can not read .*codec'),
    (b' ' * 2000, 'is larger than'),
  ],
)
def test_what_is_no_object_is_refused(tmp_path, monkeypatch, content, message):
  monkeypatch.setattr(files, 'MAX_TEXT_BYTES', 200000 if len(content) == 100000 else 1000)
  (tmp_path / 'x').write_bytes(content)
  with pytest.raises(UserError, match=message):
    read_json_object(tmp_path / 'x')


def test_what_is_not_there_is_said(tmp_path):
  with pytest.raises(UserError, match='can not read .*x: No such file'):
    read_json_object(tmp_path / 'x')
