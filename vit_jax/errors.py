"""User errors, which are shown as one line without a traceback, and the exit codes of a run."""

import difflib
import importlib.util
import re
from collections.abc import Iterable

# Exit codes. Launchers act on them. 74 and 75 are those of sysexits.h.
# fmt: off
EXIT_SUCCESS = 0
EXIT_CRASH = 1  # An error with a traceback.
EXIT_USER_ERROR = 2  # One line that says what the user has to correct.
EXIT_STORAGE = 74  # A file system failed to write or read despite retries (EX_IOERR).
EXIT_RESTART = 75  # Start again: preempted and saved, or a host is lost or missing (EX_TEMPFAIL).
EXIT_HANG = 76  # The watchdog ended a process that hung; the stacks of all threads were shown.
EXIT_CRASH_LOOP = 77  # The last starts all crashed without a new checkpoint.
EXIT_DIVERGED = 78  # Too many non-finite losses or gradients in a row.
EXIT_INTERRUPTED = 130  # Ctrl-C, as in shells; the run was saved unless it was pressed twice.
EXIT_ABORTED = 134  # JAX aborts a process that has lost another host.
# fmt: on

RESTARTABLE_EXIT_CODES = (EXIT_RESTART, EXIT_HANG, EXIT_ABORTED)  # The same command may succeed.


class UserError(Exception):
  """An error that the user can correct: what is wrong, what was expected, and what to do."""

  exit_code = EXIT_USER_ERROR


class StorageError(UserError):
  """A file system operation that failed despite retries."""

  exit_code = EXIT_STORAGE


class MissingHostsError(UserError):
  """Some hosts did not join in time. One may still be being replaced, so all hosts start again."""

  exit_code = EXIT_RESTART


class DivergedError(UserError):
  """Training produces non-finite numbers."""

  exit_code = EXIT_DIVERGED


class CrashLoopError(UserError):
  """Restarting the run has failed repeatedly."""

  exit_code = EXIT_CRASH_LOOP


def did_you_mean(word: str, known: Iterable[str], *, list_known: bool = True) -> str:
  """Return ' Did you mean X?' for the closest of `known`, or ' Known: ….' if none is close.

  The text starts with a space. With `list_known=False` it is empty if none is close.
  """
  known = list(known)
  near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
  if near:
    return f' Did you mean {near[0]!r}?'
  return f' Known: {", ".join(known)}.' if list_known else ''


def one_line(error: BaseException, limit: int = 500) -> str:
  """Return the message of an exception on one line, or the name of its type if it is empty."""
  return ' '.join(str(error).split())[:limit] or type(error).__name__


def format_error(error: BaseException) -> str:
  """Return 'error: MESSAGE' on one line, without passwords. Control characters are escaped."""
  text = mask_credentials(str(error).rstrip())
  return 'error: ' + ''.join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def mask_credentials(text: str) -> str:
  """Replace user names and passwords of URLs in a text by three asterisks."""
  return re.sub(r'(?<=://)[^/?#\s]*@', '***@', text)


def check_installed(feature: str, extra: str, *modules: str):
  """Raise UserError with the installation command if `feature` lacks any of `modules`.

  `extra` is the optional dependency group of vit-jax that contains them.
  """
  missing = [name for name in modules if importlib.util.find_spec(name) is None]
  if missing:
    raise UserError(f"{feature} needs {' and '.join(missing)}: pip install 'vit-jax[{extra}]'")
