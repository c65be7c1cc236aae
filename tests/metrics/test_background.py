"""Writers of metrics survive storage that fails or hangs, and a clock that jumps."""

import threading
import time
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from vit_jax.errors import StorageError
from vit_jax.metrics import background, step_log, writer
from vit_jax.metrics.background import BackgroundWriter
from vit_jax.metrics.records import read_metrics
from vit_jax.metrics.tensorboard import EventFiles
from vit_jax.metrics.writer import MetricsWriter
from vit_jax.runtime import files

TRAIN = {'loss': 1.0, 'lr': 0.1}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
  monkeypatch.setattr(background, 'RETRY_PERIOD', 0.01)


class Disk:
  """Storage that fails while `full`, and hangs until `free` is set."""

  def __init__(self, full=False, hangs=False):
    self.full, self.free, self.items, self.attempts = full, threading.Event(), [], 0
    if not hangs:
      self.free.set()

  def write(self, items):
    self.free.wait()
    self.attempts += 1
    if self.full:
      raise OSError(28, 'No space left on device')
    self.items += items


def wait_until(condition):
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.001)


def test_records_wait_for_a_full_disk_and_are_written_in_order_once_it_has_space():
  disk, said = Disk(full=True), []
  out = BackgroundWriter('x.jsonl', disk.write, said.append)
  for i in range(5):
    out.put(i)
    out.flush()
  wait_until(lambda: disk.attempts > 3)
  assert len(said) == 1 and 'x.jsonl' in said[0] and 'No space' in said[0]
  disk.full = False
  wait_until(lambda: disk.items == [0, 1, 2, 3, 4])
  out.put(5)
  out.close()
  assert disk.items == [0, 1, 2, 3, 4, 5] and said[1:] == ['x.jsonl is written again']


def test_lost_records_are_counted(monkeypatch):
  monkeypatch.setattr(background, 'CAPACITY', 3)
  disk, said = Disk(full=True), []
  out = BackgroundWriter('x.jsonl', disk.write, said.append)
  for i in range(8):
    out.put(i)
  out.close()
  out.close()
  assert 'lacks 8 records' in said[-1] and len(said) == 2
  disk, said = Disk(hangs=True), []
  out = BackgroundWriter('x.jsonl', disk.write, said.append)
  for i in range(8):
    out.put(i)
  disk.free.set()
  out.close()
  assert disk.items == [0, 1, 2] and said == ['x.jsonl lacks 5 records that could not be written']


def test_storage_that_hangs_does_not_block(monkeypatch):
  monkeypatch.setattr(background, 'FLUSH_TIMEOUT', 0.05)
  disk, said = Disk(hangs=True), []
  out = BackgroundWriter('x.jsonl', disk.write, said.append)
  for i in range(2000):
    out.put(i)
  out.flush()
  out.close()  # The test's time limit ends what blocks.
  assert said and 'lacks 2,000' in said[0]
  disk.free.set()


def test_a_report_to_a_lost_screen_does_not_end_the_writer():
  def report(text):
    raise BrokenPipeError(32, 'Broken pipe')

  disk = Disk(full=True)
  out = BackgroundWriter('x', disk.write, report)
  out.put(1)
  wait_until(lambda: disk.attempts > 1)
  disk.full = False
  wait_until(lambda: disk.items == [1])
  out.close()
  assert disk.items == [1]


def read_events(file):
  """Return the events of a file: a length, its checksum, an Event, its checksum."""
  data, events = file.read_bytes(), []
  while data:
    length = int.from_bytes(data[:8], 'little')
    events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  return events


def test_tensorboard_continues_in_a_new_file_after_a_failed_write(tmp_path, monkeypatch, capsys):
  full, opened_files = [False], []

  class Full(writer.EventFiles):
    def _open(self):
      opened = super()._open()
      opened_files.append(opened.path)
      write = opened.write

      def write_or_fail(data):
        if full[0]:
          opened._writer.write(data[:3])  # Cut short.
          raise OSError(28, 'No space left on device')
        write(data)

      opened.write = write_or_fail
      return opened

  monkeypatch.setattr(writer, 'EventFiles', Full)
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  metrics.write(1, TRAIN, kind='train')
  wait_until(lambda: not metrics._events._items)
  full[0] = True
  for step in range(2, 6):
    metrics.write(step, TRAIN, kind='train')
  wait_until(lambda: len(opened_files) > 4)
  full[0] = False
  metrics.write(6, TRAIN, kind='train')
  metrics.close()
  # The first and the last file; attempts in between leave none.
  assert {str(path) for path in (tmp_path / 'tensorboard').iterdir()} == {
    opened_files[0],
    opened_files[-1],
  }
  steps = {event.step for event in read_events(Path(opened_files[-1])) if event.summary.value}
  assert steps == {2, 3, 4, 5, 6}
  assert [record['step'] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
  assert capsys.readouterr().err.count('No space') == 1


@pytest.mark.parametrize('jump', [-90 * 86400.0, 90 * 86400.0])
def test_a_clock_that_jumps_by_months_blocks_nothing(tmp_path, monkeypatch, jump):
  metrics, now, jumped = MetricsWriter(tmp_path, step=0, steps=9), time.time, [0.0]
  monkeypatch.setattr(time, 'time', lambda: now() + jumped[0])
  for step in range(1, 41):
    jumped[0] = jump if step > 2 else 0.0
    metrics.write(step, TRAIN, kind='train')
  metrics.close()
  (file,) = (tmp_path / 'tensorboard').iterdir()
  assert {e.step for e in read_events(file) if e.summary.value} == set(range(1, 41))


def test_tensorboard_does_not_recreate_a_run_directory_that_was_removed(tmp_path):
  with pytest.raises(FileNotFoundError):
    EventFiles(tmp_path / 'gone' / 'tensorboard').write([event_pb2.Event(step=1)])
  assert not list(tmp_path.iterdir())


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path, monkeypatch):
  import resource
  import signal

  path = tmp_path / 'x.jsonl'
  files.append_text(path, 'one\n')
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (9, limits[1]))  # The kernel writes 5 bytes of 6.
  try:
    with pytest.raises(OSError, match='large'):
      files.append_text(path, 'three\n')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert path.read_bytes() == b'one\n'
  files.append_text(path, 'zwei ü\n')
  assert path.read_bytes() == b'one\nzwei \xc3\xbc\n'


@pytest.mark.parametrize(('failures', 'ends'), [(1, False), (3, False), (4, True)])
def test_ids_are_retried_and_then_end_the_run_with_exit_code_74(
  tmp_path, monkeypatch, failures, ends
):
  from tests.metrics.test_step_log import add, lines, open_log

  left = [failures]

  def append(path, text):
    left[0] -= 1
    if left[0] >= 0:
      raise OSError(5, 'Input/output error')
    files.append_text(path, text)

  monkeypatch.setattr(step_log, 'append_text', append)
  monkeypatch.setattr(files, 'RETRY_DELAYS', (0.001,) * 3)
  log = open_log(tmp_path)
  add(log, 1)
  log.flush()
  assert bool(log.abort_error) == ends
  if ends:
    with pytest.raises(StorageError, match='step 1 .*Input/output') as error:
      log.close()
    assert error.value.exit_code == 74
  else:
    log.close()
  # One more attempt is made at the end.
  assert [line['step'] for line in lines(tmp_path)] == [1]
