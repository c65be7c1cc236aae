"""`verify` checks each part of a run, exits with 1 if one is damaged, and changes nothing."""

import sys

import pytest

from tests.soak.damage import flip_bit, save_three_checkpoints
from vit_jax.__main__ import main
from vit_jax.checkpoint.run_directory import write_run_description
from vit_jax.config import Config


@pytest.fixture
def run(tmp_path):
  """Return a run directory with three checkpoints."""
  save_three_checkpoints(tmp_path / 'run', 0.1)
  write_run_description(tmp_path / 'run', Config(steps=3), ('cat', 'dog'))
  return tmp_path / 'run'


@pytest.fixture
def verify(run, monkeypatch, capsys):
  """Return a function that runs the command: (exit code, lines)."""

  def verify():
    before = {path: path.stat() for path in run.rglob('*')}
    monkeypatch.setattr(sys, 'argv', ['vit-jax', 'verify', str(run)])
    with pytest.raises(SystemExit) as end:
      main()
    assert {path: path.stat() for path in run.rglob('*') if path in before}.keys() == before.keys()
    assert all(path.stat().st_mtime_ns == before[path].st_mtime_ns for path in run.rglob('*'))
    return end.value.code, capsys.readouterr().out.splitlines()

  return verify


def test_an_intact_run_is_good(verify):
  code, lines = verify()
  assert code == 0
  assert [line.split()[:2] for line in lines] == [
    ['config.json', 'good'], ['preprocessing.json', 'good'], ['labels.txt', 'good'],
    ['checkpoints/1', 'good'], ['checkpoints/2', 'good'], ['checkpoints/3', 'good'],
  ]  # fmt: skip
  assert lines[2].endswith('2 classes') and lines[3].endswith('5 arrays, 0.1 MiB')


def test_damaged_parts_are_named(verify, run):
  flip_bit(max((run / 'checkpoints' / '2').rglob('*'), key=lambda path: path.stat().st_size), 40003)
  (run / 'checkpoints' / '3' / 'digest' / 'leaves.json').unlink()
  (run / 'labels.txt').unlink()
  code, lines = verify()
  assert code == 1
  assert [line.split(maxsplit=2)[1] for line in lines] == [
    'good',
    'good',
    'DAMAGED',
    'good',
    'DAMAGED',
    'DAMAGED',
  ]
  assert 'params/head/kernel' in lines[4]
  assert 'it has no digest/leaves.json' in lines[5]


def test_a_missing_directory_is_damaged(run, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['vit-jax', 'verify', str(run / 'nothing')])
  with pytest.raises(SystemExit) as end:
    main()
  assert end.value.code == 1
  assert 'DAMAGED' in capsys.readouterr().out
