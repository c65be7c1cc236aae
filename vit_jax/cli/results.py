"""Output of the commands: results go to stdout or a file, messages to stderr."""

import contextlib
import csv
import functools
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from vit_jax.errors import UserError
from vit_jax.runtime.files import escape_formula
from vit_jax.runtime.screen import print_stderr

STDOUT = '-'


@contextlib.contextmanager
def report_elapsed_time(text: str, every: float = 20):
  """Print what is being done, and the elapsed time every `every` seconds until the block ends."""
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


def check_output_paths(**paths: str | None):
  """Raise UserError if a result cannot be written, or if two results go to stdout.

  Call it before the work whose result would be lost. A keyword is an option's name; its value is a
  path, STDOUT, or None for no output.
  """
  outputs = {f'--{name}': path for name, path in paths.items() if path is not None}
  on_stdout = [option for option, path in outputs.items() if path == STDOUT]
  if len(on_stdout) > 1:
    raise UserError(f'{" and ".join(on_stdout)} both go to stdout: choose a file for one of them')
  for option, path in outputs.items():
    if path != STDOUT and Path(path).is_dir():
      raise UserError(f'{option} {path} is a folder: expected a file')
    if path != STDOUT and not Path(path).parent.is_dir():
      raise UserError(f'{option} {path}: the folder {Path(path).parent} does not exist')


def write_output(text: str, path: str | None):
  """Write text to a file, or to stdout if `path` is STDOUT. None discards it.

  Raises UserError if the file cannot be written.
  """
  with open_output(path) as write:
    write(text)


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[Callable[[str], None]]:
  """Yield a function that appends text to a new file, or to stdout if `path` is STDOUT.

  Text is in the file as soon as the function returns. With None the function discards it.
  Raises UserError if the file cannot be written.
  """
  with contextlib.ExitStack() as files:
    if path is None:
      write = lambda data: None
    elif path == STDOUT:
      sys.stdout.flush()
      write = functools.partial(_write_and_flush, sys.stdout.buffer)
    else:
      with _explain_os_error(path):
        file = files.enter_context(Path(path).open('wb'))
      write = functools.partial(_write_and_flush, file)

    def write_text(text: str):
      with _explain_os_error(path):
        # File names that are not valid UTF-8 are written back as their bytes.
        write(text.encode(errors='surrogateescape'))

    yield write_text


def _write_and_flush(file: BinaryIO, data: bytes):
  file.write(data)
  file.flush()


@contextlib.contextmanager
def _explain_os_error(path: str | None) -> Iterator[None]:
  """Raise UserError instead of an OSError about the file. A broken pipe of stdout is no error."""
  try:
    yield
  except BrokenPipeError:
    raise
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from None


def format_csv(rows: Iterable[Iterable]) -> str:
  """Format rows as CSV. See `escape_formula` for text such as '=1'."""
  lines: list[str] = []
  file = types.SimpleNamespace(write=lines.append)  # It is called once a row.
  # The terminator makes the writer quote both of its characters.
  csv.writer(file, lineterminator='\r\n').writerows(map(escape_formula, row) for row in rows)
  return ''.join(line.removesuffix('\r\n') + '\n' for line in lines)


def format_table(rows: list[tuple[str, ...]]) -> str:
  """Format rows as aligned columns: the first to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
  return ''.join('  '.join(cells).rstrip() + '\n' for cells in aligned)
