"""A fixture that runs commands in a temporary directory."""

import pytest


@pytest.fixture
def command(typed, tmp_path, monkeypatch):
  """Return a function that runs a command in `tmp_path`: (exit code, stdout, stderr)."""
  monkeypatch.chdir(tmp_path)
  return typed
