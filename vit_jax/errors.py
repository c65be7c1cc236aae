"""The one kind of error that a person can mend: it is shown as one line, without a traceback."""

import difflib
import importlib.util
from collections.abc import Iterable

from vit_jax import exits


class UserError(Exception):
  """Names what was got, what was expected, and what to do about it."""

  exit_code = exits.MISTAKE


class StorageError(UserError):
  """A file system failed, and did so again when it was tried again."""

  exit_code = exits.STORAGE


class MissingHostsError(UserError):
  """Not all hosts came to the start. One that is being replaced comes later: all start again."""

  exit_code = exits.RESTART


class DivergedError(UserError):
  """Training gives numbers that are not finite."""

  exit_code = exits.DIVERGED


class CrashLoopError(UserError):
  """Starting again has not helped, again and again."""

  exit_code = exits.LOOPING


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
