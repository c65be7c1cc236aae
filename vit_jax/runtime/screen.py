"""Standard streams that any text can be printed to, and that may lose their reader.

A terminal that hangs up, `2>&1 | head`, a full disk behind `2>log` and `2>&-` are no reason to end
a run.
"""

import contextlib
import io
import os
import sys
from typing import TextIO


def use_utf8():
  """Start the interpreter again in UTF-8 mode if the locale's encoding is another one.

  Otherwise names of files and classes that are not ASCII could be neither read nor written. What
  the locale cannot show is printed as escapes. Call it first of all.
  """
  if sys.getfilesystemencoding() == 'utf-8' or os.environ.get('PYTHONUTF8') == '1':
    return
  encoding = getattr(sys.stdout, 'encoding', None) or 'ascii'
  os.environ['PYTHONUTF8'] = '1'
  os.environ.setdefault('PYTHONIOENCODING', f'{encoding}:backslashreplace')
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare_screen():
  """Let every text be printed, and no error of standard error end the process."""
  for descriptor in (0, 1, 2):  # If one is closed, the next file that is opened would become it.
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # Returns the lowest number that is free.
  sys.stdout = sys.stdout or _open_screen(1, 'utf-8', by_line=False)
  sys.stderr = _ignore_lost_reader(sys.stderr, 2)
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')


def ignore_lost_stdout():
  """Discard standard output once its reader is gone, for commands whose result is elsewhere."""
  sys.stdout = _ignore_lost_reader(sys.stdout, 1)


class _Screen(io.FileIO):
  """A file whose failed writes are discarded."""

  def write(self, data) -> int:
    """Write bytes, and return their number even if that fails."""
    with contextlib.suppress(OSError):
      return super().write(data) or len(data)
    return len(data)


def _ignore_lost_reader(stream: TextIO | None, descriptor: int) -> TextIO:
  """Return a stream for `descriptor`, or `stream` itself if it writes to another place."""
  if stream is None:
    return _open_screen(descriptor, 'utf-8', by_line=True)
  try:
    if stream.fileno() != descriptor:
      return stream
  except (OSError, ValueError, AttributeError):
    return stream
  with contextlib.suppress(OSError):
    stream.flush()
  # With PYTHONUNBUFFERED, as in many containers, `line_buffering` is false.
  by_line = stream.line_buffering or stream.write_through
  return _open_screen(descriptor, stream.encoding, by_line=by_line)


def _open_screen(descriptor: int, encoding: str, *, by_line: bool) -> TextIO:
  """Open a stream that is written out after each line, or else when its buffer is full."""
  raw = _Screen(descriptor, 'w', closefd=False)
  return io.TextIOWrapper(
    io.BufferedWriter(raw), encoding, errors='backslashreplace', line_buffering=by_line
  )


def print_stderr(text: str):
  """Print a line to stderr and flush it."""
  print(text, file=sys.stderr, flush=True)
