"""The one kind of error that a person can mend: it is shown as one line, without a traceback."""

import difflib
import importlib.util
from collections.abc import Iterable

# Exit codes: what a process reports of a run. Launchers act on them.
EXIT_SUCCESS = 0


EXIT_CRASH = 1  # An error with a traceback.


EXIT_USER_ERROR = 2  # One line that says what the person can mend.


EXIT_STORAGE = 74  # A file system that can not be written or read, after trying again. sysexits.h: an input/output error.


EXIT_RESTART = 75  # Start me again: told to stop and saved, or another host was lost or not there. sysexits.h: a temporary failure.


EXIT_HANG = 76  # No sign of life for too long; every thread's stack was shown.


EXIT_CRASH_LOOP = 77  # The last starts all ended in an error, without a new checkpoint.


EXIT_DIVERGED = 78  # Losses or gradients that are not finite, too many in a row.


EXIT_INTERRUPTED = 130  # Ctrl-C, as shells say it; the run was saved unless it was pressed twice.


EXIT_ABORTED = 134  # JAX itself ends a process that has lost another host so.


RESTARTABLE_EXIT_CODES = (
  EXIT_RESTART,
  EXIT_HANG,
  EXIT_ABORTED,
)  # With these, starting the same command again helps.


class UserError(Exception):
  """Names what was got, what was expected, and what to do about it."""

  exit_code = EXIT_USER_ERROR


class StorageError(UserError):
  """A file system failed, and did so again when it was tried again."""

  exit_code = EXIT_STORAGE


class MissingHostsError(UserError):
  """Not all hosts came to the start. One that is being replaced comes later: all start again."""

  exit_code = EXIT_RESTART


class DivergedError(UserError):
  """Training gives numbers that are not finite."""

  exit_code = EXIT_DIVERGED


class CrashLoopError(UserError):
  """Starting again has not helped, again and again."""

  exit_code = EXIT_CRASH_LOOP


def did_you_mean(word: str, known: Iterable[str]) -> str:
  """' Did you mean X?' for the nearest of `known`, or the whole list where nothing is near. Starts with a space."""
  known = list(known)
  near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
  return f' Did you mean {near[0]!r}?' if near else f' Known: {", ".join(known)}.'


def check_installed(feature: str, extra: str, *modules: str):
  """Raise UserError with the command that installs them if `feature` needs `modules` that are missing. `extra` brings them."""
  missing = [name for name in modules if importlib.util.find_spec(name) is None]
  if missing:
    raise UserError(f"{feature} needs {' and '.join(missing)}: pip install 'vit-jax[{extra}]'")
