"""The command line as a person types it, in a directory of its own."""

import sys
from pathlib import Path

import pytest

from vit_jax.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
  """(exit code, standard output, errors) of what is typed in `tmp_path`."""
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'compiled'))
  monkeypatch.chdir(tmp_path)

  def run(*args: str):
    monkeypatch.setattr(sys, 'argv', ['vit-jax', *args])
    try:
      main()
      code = 0
    except SystemExit as end:
      code = end.code
    return code, *capsys.readouterr()

  return run
