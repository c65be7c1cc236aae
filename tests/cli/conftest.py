"""The command line as a person types it, in a directory of its own."""

import pytest


@pytest.fixture
def command(typed, tmp_path, monkeypatch):
  """(exit code, standard output, errors) of what is typed in `tmp_path`."""
  monkeypatch.chdir(tmp_path)
  return typed
