"""The command line: what it prints and writes, and its errors."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.pretrained.released_layout import google_file
from vit_jax.config import ModelConfig

ROOT = Path(__file__).parents[2]
LABELS = ['cat', 'cow', 'dog']
MODEL = ('--init', 'model.npz')
PREDICT = ('predict', *MODEL, 'photos')
EVALUATE = ('evaluate', *MODEL, '--data', 'folder:photos')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Return a directory with a model and six photographs."""
  place, rng = tmp_path_factory.mktemp('made'), np.random.default_rng(0)
  google_file(place / 'model.npz', ModelConfig(variant='mu/8', depth=2), classes=3, size=(32, 32))
  (place / 'model.json').write_text(
    json.dumps({'labels': LABELS, 'size': [32, 32]}), encoding='utf-8'
  )
  for i in range(6):
    folder = place / 'photos' / 'val' / LABELS[i % 3]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), np.uint8)).save(folder / f'{i}.png')
  (place / 'broken.jpg').write_bytes(b'\xff\xd8\xff')
  (place / 'names.txt').write_text('tic\ntac\ntoe\n', encoding='utf-8')
  return place


@pytest.fixture
def run(made, typed, monkeypatch):
  """Return a function that runs a command in the directory: (exit code, stdout, stderr)."""
  monkeypatch.chdir(made)
  return typed


def test_predict_prints_a_line_per_class_the_most_probable_first(run):
  code, out, err = run(*PREDICT, '--top', '2')
  lines = [
    re.fullmatch(r'(photos/val/\w+/\d\.png| +) +(\d+\.\d\d)%  (\w+)', line)
    for line in out.splitlines()
  ]
  assert (code, err, len(lines)) == (0, '', 12)
  assert len({line.start(3) for line in lines}) == 1
  for first, second in zip(lines[::2], lines[1::2], strict=True):
    assert first[1].startswith('photos')
    assert not second[1].strip()
    assert float(first[2]) >= float(second[2])
    assert {first[3], second[3]} < set(LABELS)


def test_json_and_csv_have_the_predictions_of_the_loaded_model(run, tmp_path):
  code, out, _ = run(
    'predict', *MODEL, 'photos/val/*/*.png', '--json', '-', '--csv', str(tmp_path / 'out.csv')
  )
  found = json.loads(out)
  assert (code, len(found)) == (0, 6)
  own = vit_jax.load('model.npz').predict([each['path'] for each in found])
  for each, prediction in zip(found, own, strict=True):
    assert [row['label'] for row in each['predictions']] == list(prediction.labels)
    np.testing.assert_allclose(
      [row['probability'] for row in each['predictions']], prediction.probabilities, atol=1e-5
    )
  with (tmp_path / 'out.csv').open(newline='') as file:
    rows = [
      (row['path'], int(row['rank']), row['label'], float(row['probability']))
      for row in csv.DictReader(file)
    ]
  pairs = [
    (each['path'], rank, row)
    for each in found
    for rank, row in enumerate(each['predictions'], start=1)
  ]
  assert [row[:3] for row in rows] == [(path, rank, row['label']) for path, rank, row in pairs]
  assert [row[3] for row in rows] == pytest.approx(
    [row['probability'] for _, _, row in pairs], rel=1e-5
  )


def test_an_unreadable_image_is_a_row_and_exit_code_1(run):
  code, out, err = run('predict', *MODEL, 'broken.jpg', 'photos', '--top', '1')
  assert (code, err) == (1, '1 of 7 images could not be read\n')
  first, *rest = out.splitlines()
  assert re.fullmatch('broken.jpg +error  the file is truncated', first)
  assert len([line for line in rest if '%' in line]) == 6
  _, out, _ = run('predict', *MODEL, 'broken.jpg', '--csv', '-')
  assert out.splitlines() == [
    'path,rank,label,probability,error',
    'broken.jpg,,,,the file is truncated',
  ]
  _, out, _ = run('predict', *MODEL, 'broken.jpg', '--json', '-')
  assert json.loads(out) == [{'path': 'broken.jpg', 'error': 'the file is truncated'}]


def test_notes_go_to_stderr_and_labels_can_be_overridden(run):
  code, out, err = run(
    'predict', *MODEL, 'photos', '--size', '48', '--labels', 'names.txt', '--json', '-'
  )
  assert code == 0
  assert 'position embeddings resampled from 4x4 to 6x6' in err
  assert {row['label'] for row in json.loads(out)[0]['predictions']} == {'tic', 'tac', 'toe'}


def test_a_threshold_leaves_only_the_classes_above_it(run):
  _, out, _ = run('predict', *MODEL, 'photos', '--json', '-')
  everything = json.loads(out)
  above = sorted(row['probability'] for each in everything for row in each['predictions'])
  threshold = above[len(above) // 2]  # Between the classes of some image.
  code, out, _ = run('predict', *MODEL, 'photos', '--json', '-', '--threshold', repr(threshold))
  assert code == 0
  for few, each in zip(json.loads(out), everything, strict=True):
    expected = [row for row in each['predictions'] if row['probability'] >= threshold]
    assert few == {'path': each['path'], 'predictions': expected}


def test_an_image_whose_classes_are_all_below_the_threshold_has_a_row(run):
  code, out, _ = run('predict', *MODEL, 'photos', '--csv', '-', '--threshold', '1')
  head, *rows = out.splitlines()
  assert code == 0 and head == 'path,rank,label,probability,error'
  assert rows and all(row.endswith(',,,,') for row in rows)
  _, out, _ = run('predict', *MODEL, 'photos', '--threshold', '1')
  assert all(line.endswith('none  no class reaches the threshold') for line in out.splitlines())


def test_evaluate_agrees_with_the_predictions_of_the_loaded_model(run, tmp_path):
  files = {name: str(tmp_path / name) for name in ('out.json', 'classes.csv', 'confusion.png')}
  asked = (
    '--json',
    files['out.json'],
    '--per_class',
    files['classes.csv'],
    '--confusion',
    files['confusion.png'],
  )
  code, out, err = run(*EVALUATE, '--batch', '5', *asked)
  assert (code, err) == (0, '')
  found = vit_jax.load('model.npz').predict(
    [f'photos/val/{LABELS[i % 3]}/{i}.png' for i in range(6)], top=1
  )
  right = [each.labels[0] == LABELS[i % 3] for i, each in enumerate(found)]
  assert out.splitlines()[0] == 'model.npz on folder:photos val, 3 classes'
  assert f'accuracy  {np.mean(right):8.2%}  (' in out
  facts = json.loads((tmp_path / 'out.json').read_text(encoding='utf-8'))
  assert (facts['accuracy'], facts['accuracy_top5'], facts['examples'], facts['skipped']) == (
    np.mean(right),
    1,
    6,
    0,
  )
  with (tmp_path / 'classes.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['class'] for row in rows] == LABELS
  assert [int(row['correct']) for row in rows] == [right[i] + right[i + 3] for i in range(3)]
  with Image.open(tmp_path / 'confusion.png') as picture:
    assert picture.format == 'PNG'


def test_the_table_of_classes_starts_with_the_worst(run):
  _, out, _ = run(*EVALUATE, '--per_class', '-')
  head, *rows = (line.split() for line in out.splitlines()[8:])
  assert head == ['class', 'examples', 'correct', 'accuracy', 'precision', 'f1']
  assert sorted(row[0] for row in rows) == LABELS
  shares = [float(row[3].rstrip('%')) for row in rows]
  assert shares == sorted(shares)


def test_preprocessing_that_differs_from_the_models_own_is_a_warning(run):
  code, _, err = run(*EVALUATE, '--size', '48', '--mean', '0.4,0.5,0.6', '--std', '0.5')
  assert code == 0
  assert "warning: size 48,48, where the model's own is 32,32\n" in err
  assert 'warning: mean 0.4,0.5,0.6, where files of this kind usually have 0.5,0.5,0.5\n' in err
  assert 'std' not in err


def test_the_orientation_of_photos_is_ignored_where_a_published_number_is_compared(
  run, monkeypatch, tmp_path
):
  from vit_jax.cli import evaluate

  seen, exif = [], Image.Exif()
  exif[0x0112] = 6  # A quarter turn.
  for name in LABELS:
    folder = tmp_path / 'sideways' / 'val' / name
    folder.mkdir(parents=True)
    Image.new('RGB', (50, 40)).save(folder / '1.jpg', exif=exif)
  original = evaluate._run_evaluation
  monkeypatch.setattr(
    evaluate,
    '_run_evaluation',
    lambda args, model, *rest: [
      seen.append(model.preprocessing.orient), original(args, model, *rest)
    ][1],
  )  # fmt: skip
  data = ('--data', f'folder:{tmp_path / "sideways"}')
  assert run('evaluate', *MODEL, *data)[0] == 0
  monkeypatch.setattr(evaluate, '_is_published_split', lambda source: True)
  assert run('evaluate', *MODEL, *data)[0] == 0
  assert run('evaluate', *MODEL, *data, '--orient', 'exif')[0] == 0
  assert seen == ['auto', 'ignore', 'exif']


def test_flags_replace_the_steps_of_the_model_with_a_warning(run):
  flags = ('--crop', 'center', '--interpolation', 'pil_bicubic', '--jpeg_dct', 'accurate')
  code, out, err = run(*EVALUATE, *flags, '--short_side', '36', '--json', '-')
  assert code == 0
  steps = json.loads(out)['preprocessing']
  assert (steps['crop'], steps['resize_size']) == ('center', [36, 36])
  assert (steps['interpolation'], steps['jpeg_dct']) == ('pil_bicubic', 'accurate')
  usually = 'where files of this kind usually have'
  assert f'warning: crop center, {usually} resize\n' in err
  assert f'warning: interpolation pil_bicubic, {usually} tf_bilinear\n' in err
  code, _, err = run(*EVALUATE, '--crop', 'middle')
  assert (code, err.count('\n')) == (2, 1)


def test_an_unreadable_example_is_an_error_unless_skipped(run, made, tmp_path):
  (tmp_path / 'photos' / 'val').mkdir(parents=True)
  for name in LABELS:
    (tmp_path / 'photos' / 'val' / name).symlink_to(made / 'photos' / 'val' / name)
  (tmp_path / 'photos' / 'val' / 'cat').unlink()
  (tmp_path / 'photos' / 'val' / 'cat').mkdir()
  (tmp_path / 'photos' / 'val' / 'cat' / 'x.jpg').write_bytes(b'\xff\xd8\xff')
  data = ('--data', f'folder:{tmp_path / "photos"}')
  code, _, err = run('evaluate', *MODEL, *data)
  assert (code, err.count('\n')) == (2, 1)
  assert 'cat/x.jpg' in err
  assert '--bad_images skip' in err
  code, out, _ = run('evaluate', *MODEL, *data, '--bad_images', 'skip')
  assert code == 0
  assert re.search(r'examples +4  and 1 that could not be read', out)


def test_the_published_accuracy_is_shown_on_imagenets_validation_split(monkeypatch):
  """The model and the source are stand-ins with the names of the real ones."""
  from types import SimpleNamespace

  from vit_jax.cli.evaluate import format_summary, summarize
  from vit_jax.data.imagenet import imagenet_synsets
  from vit_jax.data.preprocessing import Preprocessing

  class Source:
    split, classes, max_labels, label_names = 'validation', 1000, 1, imagenet_synsets('imagenet1k')

    def __len__(self):
      return 50_000

  steps = Preprocessing(size=(224, 224))
  model = SimpleNamespace(
    source='B_16', accuracy=81.5, accuracy_from='the table', preprocessing=steps
  )
  numbers = {
    'accuracy': 0.8142,
    'accuracy_top5': 0.96,
    'loss': 0.7,
    'examples': 50_000,
    'skipped': 0,
    'images_per_second': 9.0,
  }
  facts = summarize(
    model, SimpleNamespace(data='tfds:imagenet2012'), Source(), SimpleNamespace(**numbers)
  )
  assert 'accuracy    81.42%  expected 81.50% (the table)\n' in format_summary(facts)
  monkeypatch.setattr(Source, '__len__', lambda self: 10_000)
  assert 'expected' not in format_summary(
    summarize(model, SimpleNamespace(data='x'), Source(), SimpleNamespace(**numbers))
  )


def test_export_verifies_the_written_file(run, tmp_path):
  code, out, _ = run('export', *MODEL, '--to', str(tmp_path / 'again.npz'))
  assert code == 0
  assert 'again.npz: npz, 0.1 MiB; relative error after reading it again: 0.0e+00' in out


USER_ERRORS = {
  'no such image': (('predict', *MODEL, 'nothing'), 'nothing'),
  'no such model': (('predict', '--init', 'nothing', 'photos'), "'nothing'"),
  'no model': (('predict', 'photos'), 'the following arguments are required: --init'),
  'no command': ((), 'the following arguments are required: COMMAND'),
  'a command that is not': (('predct',), "invalid choice: 'predct'"),
  'a flag that is not': ((*PREDICT, '--tpo', '3'), 'unrecognized arguments: --tpo'),
  'a flag cut short': ((*PREDICT, '--bat', '3'), 'unrecognized arguments: --bat'),
  'no classes asked for': ((*PREDICT, '--top', '0'), "--top: '0'"),
  'more classes than there are': ((*PREDICT, '--top', '4'), '--top 4: model.npz has 3 classes'),
  'another gelu': ((*PREDICT, '--gelu', 'relu'), "--gelu: invalid choice: 'relu'"),
  'a size in words': ((*PREDICT, '--size', 'large'), "--size: 'large': expected pixels"),
  'a size that does not divide': ((*PREDICT, '--size', '30'), 'does not divide into patches'),
  'a mean with spaces': (
    (*PREDICT, '--mean', '0.4', '0.5', '0.6'), 'no spaces: --mean 0.4,0.5,0.6;'
  ),
  'a size with a space': ((*EVALUATE, '--size', '48,', '32'), 'no spaces: --size 48,32;'),
  'a mean of 255': ((*PREDICT, '--mean', '127'), "--mean: '127'"),
  'two deviations': ((*PREDICT, '--std', '0.1,0.2'), "--std: '0.1,0.2'"),
  'no deviation': ((*PREDICT, '--std', '0'), 'positive'),
  'a short side without a center crop': ((*PREDICT, '--short_side', '48'), '--short_side needs --crop center'),
  'labels that are not '
  'there': ((*PREDICT, '--labels', 'none.txt'), '--labels none.txt: No such file'),
  'too few labels': ((*EVALUATE, '--labels', 'imagenet1k'), '1000 labels for 3 classes'),
  'nowhere to write': ((*PREDICT, '--json', 'no/such/folder.json'), '--json no/such/folder.json'),
  'a folder to write to': ((*PREDICT, '--csv', 'photos'), '--csv photos'),
  'two results in one place': ((*PREDICT, '--csv', '-', '--json', '-'), '--json and --csv'),
  'other classes': (('evaluate', *MODEL, '--data', 'builtin:digits'), "'0', '1'"),
  'no such data': (('evaluate', *MODEL, '--data', 'folder:nothing'), 'nothing'),
  'no such split': ((*EVALUATE, '--split', 'tset'), "no split 'tset'"),
  'no batch': ((*EVALUATE, '--batch', '-3'), '--batch'),
  'a picture on the screen': ((*EVALUATE, '--confusion', '-'), '--confusion -'),
  'several labels in a matrix': (
    ('evaluate', *MODEL, '--data', 'csv:several.csv', '--split', 'all', '--confusion', 'c.png'),
    '--confusion: examples of csv:several.csv have up to 2 labels',
  ),
  'no format': (('export', *MODEL, '--to', 'somewhere'), '--format npz or'),
  'a directory that looks like a '
  'file': (('export', *MODEL, '--to', 'm.safetensors'), 'm.safetensors'),
  'an opset without a graph': (('export', *MODEL, '--to', 'm.npz', '--opset', '20'), '--opset is only'),
  'float16 without a graph': (('export', *MODEL, '--to', 'm.npz', '--float16'), '--float16 is only'),
  'another format': (('export', *MODEL, '--to', 'm.npz', '--format', 'onnx'), '--format onnx'),
}  # fmt: skip


@pytest.mark.parametrize('case', USER_ERRORS)
def test_a_user_error_is_one_line_and_exit_code_2(run, made, case):
  args, message = USER_ERRORS[case]
  (made / 'several.csv').write_text(
    'photos/val/cat/0.png,cat;dog\nphotos/val/cow/1.png,cow\n', encoding='utf-8'
  )
  code, out, err = run(*args)
  assert (code, out) == (2, '')
  assert err.startswith('error: ')
  assert message in err
  assert len(err.splitlines()) == 1


def test_a_missing_or_untrained_head_is_a_user_error(run, tmp_path):
  with np.load('model.npz') as arrays:
    zero = dict(arrays) | {
      name: np.zeros_like(arrays[name]) for name in ('head/kernel', 'head/bias')
    }
  np.savez(tmp_path / 'zero.npz', **zero)
  np.savez(
    tmp_path / 'none.npz',
    **{name: array for name, array in zero.items() if not name.startswith('head/')},
  )
  for name, message in (('zero', 'a head of zeros'), ('none', 'has no head')):
    (tmp_path / f'{name}.json').write_text('{"size": [32, 32]}', encoding='utf-8')
    for command in (('predict', 'photos'), ('evaluate', '--data', 'folder:photos')):
      code, out, err = run(*command, '--init', str(tmp_path / f'{name}.npz'))
      assert (code, out) == (2, '')
      assert err.startswith('error: ')
      assert message in err


def test_help_does_not_import_jax():
  for command in ([], ['predict'], ['evaluate'], ['export'], ['data', 'show']):
    code = f'import sys, atexit; sys.argv = ["vit-jax", *{command}, "--help"]; '
    code += (
      'atexit.register(lambda: print([m for m in ("jax", "numpy", "cv2") if m in sys.modules])); '
    )
    code += 'import vit_jax.__main__; vit_jax.__main__.main()'
    done = subprocess.run(
      [sys.executable, '-W', 'error', '-c', code],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
    assert done.stdout.startswith('usage: vit-jax')
    assert done.stdout.endswith('[]\n')


def test_a_closed_pipe_ends_the_command_without_a_traceback(made):
  command = [sys.executable, '-m', 'vit_jax', *PREDICT, '--top', '1']
  cache = str(ROOT / '.cache' / 'compiled')
  env = {
    'PATH': '',
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': cache,
  }
  done = subprocess.run(command, cwd=made, env=env, capture_output=True, text=True, check=True)
  assert len(done.stdout.splitlines()) == 6
  assert done.stderr == ''
  with subprocess.Popen(
    command, cwd=made, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    process.stdout.close()
    assert process.stderr.read() == ''
  assert process.returncode == 1
