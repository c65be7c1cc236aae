"""Atomic writes, retries on failing storage, and bounded reads of small files."""

import errno
import os
import time

import pytest

from vit_jax.errors import StorageError, UserError
from vit_jax.metrics.writer import keep_records
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
def test_three_failures_are_retried_and_the_fourth_is_an_error(code):
  assert retry_io('reading x', failing(3, code)) == 'done'
  with pytest.raises(StorageError, match=f'reading x: {os.strerror(code)}'):
    retry_io('reading x', failing(4, code))


def test_permanent_errors_are_not_retried(monkeypatch):
  monkeypatch.setattr(files, 'RETRY_DELAYS', (60.0,))
  began = time.monotonic()
  with pytest.raises(FileNotFoundError):
    retry_io('reading x', failing(1, errno.ENOENT))
  with (
    pytest.raises(UserError, match='here: Read-only file system.*--workdir'),
    explain_write_errors('here'),
  ):
    retry_io('writing x', failing(1, errno.EROFS))
  assert time.monotonic() - began < 5


def test_a_file_is_replaced_without_leftovers(tmp_path):
  write_atomically(tmp_path / 'x', 'one')
  write_atomically(tmp_path / 'x', 'two')
  assert read_text_file(tmp_path / 'x') == 'two'
  assert [path.name for path in tmp_path.iterdir()] == ['x']


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'JSON'),
    (b'{"a": 1', 'JSON'),
    (b'[' * 100000, 'JSON'),
    (b'[1]', 'list.*object'),
    (b'\xff\xfe', 'codec'),
    (b' ' * 2000, 'MiB'),
  ],
)
def test_a_file_without_a_json_object_is_an_error(tmp_path, monkeypatch, content, message):
  monkeypatch.setattr(files, 'MAX_TEXT_BYTES', 200000 if len(content) == 100000 else 1000)
  (tmp_path / 'x').write_bytes(content)
  with pytest.raises(UserError, match=message):
    read_json_object(tmp_path / 'x')


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
  with pytest.raises(UserError, match='x: No such file'):
    read_json_object(tmp_path / 'x')


def test_a_failed_rewrite_leaves_the_file_and_nothing_else(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  lines = [f'{{"step": {step}, "kind": "train"}}\n' for step in (1, 2, 3)]
  path.write_text(''.join(lines), encoding='utf-8')

  def fail(descriptor):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', fail)
    with pytest.raises(StorageError, match='metrics.jsonl: No space left'):
      keep_records(path, 2)
  assert path.read_text(encoding='utf-8') == ''.join(lines)
  assert {each.name for each in tmp_path.iterdir()} == {'metrics.jsonl'}
  keep_records(path, 2)
  assert path.read_text(encoding='utf-8') == ''.join(lines[:2])
