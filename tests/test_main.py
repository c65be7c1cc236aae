"""The command line, as a person types it: what it prints, writes and refuses."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.pretrained.released_layout import google_file
from vit_jax.__main__ import main
from vit_jax.config import ModelConfig

LABELS = ['cat', 'cow', 'dog']


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A directory with a model and seven photographs, one of which is none."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))
  google_file(tmp_path / 'model.npz', ModelConfig(variant='mu/8', depth=2), classes=3, size=(32, 32))
  (tmp_path / 'model.json').write_text(json.dumps({'labels': LABELS}))
  rng = np.random.default_rng(0)
  for i in range(6):
    folder = tmp_path / 'photos' / 'val' / LABELS[i % 3]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), np.uint8)).save(folder / f'{i}.png')
  (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8\xff')
  return tmp_path


@pytest.fixture
def run(place, monkeypatch, capsys):
  """(exit code, standard output, errors) of a command."""

  def run(*args: str):
    monkeypatch.setattr(sys, 'argv', ['vit-jax', *args])
    try:
      main()
      code = 0
    except SystemExit as end:
      code = end.code
    return code, *capsys.readouterr()

  return run


def test_predict_prints_a_line_an_image_with_the_most_probable_classes_first(run):
  code, out, err = run('predict', '--init', 'model.npz', 'photos', '--top', '2')
  lines = out.splitlines()
  assert (code, err, len(lines)) == (0, '', 6)
  for line in lines:
    path, first, second = (part.split() for part in line.split('  ') if part)
    assert path[0].endswith('.png')
    assert first[0] in LABELS
    assert float(first[1]) >= float(second[1])


def test_predict_writes_json_and_csv(run, place):
  code, out, _ = run('predict', '--init', 'model.npz', 'photos/val/*/*.png', '--json', '-', '--csv', 'out.csv', '--top', '9')
  found = json.loads(out)
  assert (code, len(found)) == (0, 6)
  for image in found:
    assert {row['label'] for row in image['classes']} == set(LABELS)  # Nine of three are three.
    assert sum(row['probability'] for row in image['classes']) == pytest.approx(1, abs=1e-5)
  with (place / 'out.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [(row['path'], row['label']) for row in rows[:2]] == [(found[0]['path'], r['label']) for r in found[0]['classes'][:2]]
  assert len(rows) == 18


def test_an_unreadable_image_is_told_and_the_others_are_predicted(run):
  code, out, err = run('predict', '--init', 'model.npz', 'broken.jpg', 'photos')
  assert code == 1
  assert 'error: the file is cut short' in out.splitlines()[0]
  assert len([line for line in out.splitlines() if '.png' in line and '%' in line]) == 6
  assert err == 'error: broken.jpg: the file is cut short\n'


def test_evaluate_counts_every_example_and_says_what_was_asked_otherwise(run, place):
  args = ('evaluate', '--init', 'model.npz', '--data', 'folder:photos', '--batch', '8')
  code, out, err = run(*args, '--per_class', '-', '--confusion', 'confusion.png', '--json', 'out.json')
  assert (code, err) == (0, '')
  assert 'model.npz on folder:photos val: accuracy ' in out
  assert 'examples 6' in out
  assert out.splitlines()[0] == 'class,examples,correct,accuracy'
  result = json.loads((place / 'out.json').read_text())
  assert result['examples'] == 6
  assert (place / 'confusion.png').stat().st_size > 1000
  code, _, err = run(*args, '--size', '48', '--mean', '0.4,0.5,0.6')
  assert code == 0
  assert 'warning: size 48x48 instead of 32x32' in err
  assert 'warning: mean 102.0x127.5x153.0 instead of 127.5x127.5x127.5' in err


def test_export_is_read_again(run, place):
  code, out, _ = run('export', '--init', 'model.npz', '--to', 'again/model.npz')
  assert code == 0
  assert 'again/model.npz: npz, 0.1 MiB; read again, it differs by 0.0e+00 of the largest number' in out
  assert json.loads((place / 'again' / 'model.json').read_text())['labels'] == LABELS


REFUSED = {
  'no such image': (('predict', '--init', 'model.npz', 'nothing'), 'nothing: there is no such image'),
  'no such model': (('predict', '--init', 'nothing', 'photos'), "'nothing' is no file or directory"),
  'no classes asked for': (('predict', '--init', 'model.npz', 'photos', '--top', '0'), '--top=0 --batch=32: expected numbers'),
  'a bad mean': (('predict', '--init', 'model.npz', 'photos', '--mean', '127'), 'expected three shares'),
  'other classes': (('evaluate', '--init', 'model.npz', '--data', 'builtin:digits'), 'the classes differ'),
  'no such data': (('evaluate', '--init', 'model.npz', '--data', 'folder:nothing'), 'nothing'),
  'a batch that does not divide': (
    ('evaluate', '--init', 'model.npz', '--data', 'folder:photos', '--batch', '9'),
    '--batch=9 does not divide over 8 devices',
  ),
  'no format': (('export', '--init', 'model.npz', '--to', 'somewhere'), 'say which --format'),
  'nowhere to write': (('predict', '--init', 'model.npz', 'photos', '--json', 'no/such/folder.json'), 'can not write'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(run, case):
  args, message = REFUSED[case]
  code, _, err = run(*args)
  assert code == 2
  assert err.startswith('error: ')
  assert message in err
  assert len(err.splitlines()) == 1


def test_a_head_that_was_never_trained_or_is_not_there_is_not_asked(run, place):
  with np.load('model.npz') as arrays:
    zero = dict(arrays) | {name: np.zeros_like(arrays[name]) for name in ('head/kernel', 'head/bias')}
  np.savez('zero.npz', **zero)
  np.savez('none.npz', **{name: array for name, array in zero.items() if not name.startswith('head/')})
  for name, message in (('zero', 'a head of zeros'), ('none', 'has no head')):
    code, _, err = run('predict', '--init', f'{name}.npz', 'photos')
    assert code == 2
    assert message in err
  code, _, err = run('evaluate', '--init', 'none.npz', '--data', 'folder:photos')
  assert code == 2
  assert 'has no head' in err


@pytest.mark.parametrize('flag', [('--gelu', 'relu'), ('--size', 'large'), ('--std', 'a,b,c')])
def test_a_flag_that_is_no_such_thing_is_refused_by_the_parser(run, flag):
  code, _, err = run('predict', '--init', 'model.npz', 'photos', *flag)
  assert code == 2
  assert flag[0] in err


def test_as_a_command_of_its_own_whose_reader_may_stop_listening(place):
  command = [sys.executable, '-m', 'vit_jax', 'predict', '--init', 'model.npz', 'photos', '--top', '1']
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    process.stdout.close()
    assert process.stderr.read() == ''
  assert process.returncode == 0
