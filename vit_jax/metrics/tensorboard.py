"""TensorBoard's event files.

tensorboardX's own writer is not used: once its thread has died of a failed write, or while the
clock is behind, its queue fills and `add_scalar` blocks for ever.
"""

import contextlib
import itertools
import os
import socket
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

_FORMAT = 'brain.Event:2'


class EventFiles:
  """Append events to a file in `folder`; after an error, to a new file.

  TensorBoard reads no file beyond a damaged record, but it reads all files of a folder.
  """

  def __init__(self, folder: Path):
    self._folder, self._numbers = folder.absolute(), itertools.count()
    self._writer: RecordWriter | None = None
    self._path = self._folder / 'events.out.tfevents'

  def write(self, events: list[Event]):
    """Write events. After an error, some of them may be in the file that is left."""
    is_new = self._writer is None
    try:
      writer = self._writer = self._writer or self._open()
      for event in events:
        writer.write(event.SerializeToString())
      writer.flush()
    except Exception:
      with contextlib.suppress(Exception):
        self.close()
      if is_new:  # Storage may fail for hours: no attempt leaves a file.
        self._path.unlink(missing_ok=True)
      raise

  def close(self):
    """Close the file, if one is open."""
    writer, self._writer = self._writer, None
    if writer:
      writer.close()

  def _open(self) -> RecordWriter:
    self._folder.mkdir(exist_ok=True)
    name = f'{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}'
    self._path = self._folder / f'events.out.tfevents.{name}'
    self._writer = RecordWriter(str(self._path))
    self._writer.write(Event(wall_time=time.time(), file_version=_FORMAT).SerializeToString())
    return self._writer


def purge_events(step: int) -> list[Event]:
  """Return the events that hide those of `step` and later, which an interrupted run wrote."""
  start = SessionLog(status=SessionLog.START)
  return [Event(step=step, file_version=_FORMAT), Event(step=step, session_log=start)]


def scalar_event(step: int, name: str, value: float) -> Event:
  """Return the event that records a number."""
  return Event(wall_time=time.time(), step=step, summary=scalar(name, value))
