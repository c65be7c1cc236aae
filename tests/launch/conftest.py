"""A simulated cloud: stand-ins for its commands on PATH."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.__main__ import main

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / 'cloud_stand_in.py'


class Cloud:
  """The answers that the stand-ins give, and the calls that they received."""

  def __init__(self, place: Path):
    self.place = place

  def play(self, **answers):
    """Set the answers of commands, such as `describe=[…]`. Calls get them in sequence."""
    known = {
      'describe': 'gcloud compute tpus queued-resources '
                  'describe', 'create': 'gcloud compute tpus queued-resources create',
      'vm': 'gcloud compute tpus tpu-vm '
            'describe', 'ssh': 'gcloud compute tpus tpu-vm ssh', 'exits': 'gcloud storage cat',
      'delete': 'gcloud compute tpus queued-resources '
                'delete', 'jobset': 'kubectl get jobset', 'pods': 'kubectl logs',
    }  # fmt: skip
    (self.place / 'play.json').write_text(
      json.dumps({known[name]: value for name, value in answers.items()}), encoding='utf-8'
    )

  def calls(self, *words: str) -> list[list[str]]:
    """Return the calls that contain all these words."""
    lines = (
      (self.place / 'calls.jsonl').read_text(encoding='utf-8').splitlines()
      if (self.place / 'calls.jsonl').exists()
      else []
    )
    return [call for call in map(json.loads, lines) if set(words) <= set(call)]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  place = tmp_path / 'cloud'
  (place / 'bin').mkdir(parents=True)
  for name in ('gcloud', 'xpk', 'kubectl'):
    shutil.copy(STAND_IN, place / 'bin' / name)
    text = (place / 'bin' / name).read_text(encoding='utf-8')
    (place / 'bin' / name).write_text(
      text.replace('/usr/bin/env python3', f'{sys.executable} -S', 1), encoding='utf-8'
    )
    (place / 'bin' / name).chmod(0o755)
  monkeypatch.setenv('PATH', f'{place / "bin"}:{os.environ["PATH"]}')
  monkeypatch.setenv('STAND_IN', str(place))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return Cloud(place)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """Return a clean checkout with our configs, without the git settings of the user."""
  place = tmp_path / 'checkout'
  shutil.copytree(ROOT / 'configs', place / 'configs', ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('run_pretrain.py', 'requirements.txt'):
    shutil.copy(ROOT / name, place / name)
  (place / '.gitignore').write_text('__pycache__\n', encoding='utf-8')
  monkeypatch.chdir(place)
  for name in ('AUTHOR', 'COMMITTER'):
    monkeypatch.setenv(f'GIT_{name}_NAME', 'somebody')
    monkeypatch.setenv(f'GIT_{name}_EMAIL', 'somebody@example.org')
  for command in (['init', '-q'], ['add', '-A'], ['commit', '-q', '-m', 'all of it']):
    subprocess.run(['git', *command], check=True)
  return place


@pytest.fixture
def run(monkeypatch, capfd):
  """Return a function that runs a command: (exit code, stdout, stderr)."""

  def run(*args: str):
    monkeypatch.setattr(sys, 'argv', ['vit-jax', *args])
    with pytest.raises(SystemExit) as end:
      main()
    return end.value.code, *capfd.readouterr()

  return run
