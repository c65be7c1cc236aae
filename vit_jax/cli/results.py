"""Where a command's results go: stdout or a file for what was asked for, stderr for what the person should know."""

import contextlib
import csv
import io
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.runtime.cluster import print_stderr

STDOUT = '-'


@contextlib.contextmanager
def report_elapsed_time(text: str, every: float = 20):
  """Says what is being done, and every so many seconds for how long already, until it is."""
  done, began = threading.Event(), time.monotonic()

  def remind():
    while not done.wait(every):
      print_stderr(f'{text} … {time.monotonic() - began:.0f} s')

  print_stderr(f'{text} …')
  thread = threading.Thread(target=remind, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def check_output_paths(**places: str | None):
  """UserError where a file could not be written (before the work that would be lost), or two results go to stdout."""
  asked = {f'--{name}': place for name, place in places.items() if place is not None}
  if len(both := [flag for flag, place in asked.items() if place == STDOUT]) > 1:
    raise UserError(f'{" and ".join(both)} both go to stdout: name a file for one of them')
  for flag, place in asked.items():
    if place != STDOUT and Path(place).is_dir():
      raise UserError(f'{flag} {place} is a folder: name a file')
    if place != STDOUT and not Path(place).parent.is_dir():
      raise UserError(f'{flag} {place}: there is no folder {Path(place).parent}')


def write_output(text: str, place: str | None):
  """The text into a file, to stdout, or nowhere. UserError where it cannot be written."""
  if place == STDOUT:
    sys.stdout.write(text)
  elif place is not None:
    try:
      # Names of files are bytes: those that are no text come out as they went in.
      Path(place).write_text(text, encoding='utf-8', errors='surrogateescape', newline='')
    except OSError as error:
      raise UserError(f'{place} cannot be written: {error.strerror or error}') from None


def format_csv(rows: Iterable[Iterable]) -> str:
  """Comma-separated lines."""
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows(rows)
  return text.getvalue()


def format_table(rows: list[tuple[str, ...]]) -> str:
  """Aligned columns: the first to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
  return ''.join('  '.join(cells).rstrip() + '\n' for cells in aligned)
