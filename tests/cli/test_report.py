"""The commands that write report.html."""

import sys

import numpy as np
import pytest
from PIL import Image

from tests.pretrained.released_layout import google_file
from tests.tiny import get_config
from vit_jax import __main__ as command_line
from vit_jax.cli.report import write_run_report
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.settings.fields import with_settings
from vit_jax.train import train


def run(monkeypatch, *args: str):
  monkeypatch.setattr(sys, 'argv', ['vit-jax', *map(str, args)])
  command_line.run_command()


@pytest.fixture(scope='module')
def tiny_run(tmp_path_factory):
  """Return the directory of a run of three steps."""
  settings = {'steps': 3, 'data.eval_split': 'test[:40]', 'log_ids': False}
  workdir = tmp_path_factory.mktemp('report') / 'run'
  train(with_settings(get_config(), settings), workdir)
  return workdir


def test_report_writes_the_page_of_a_run_and_of_two_runs(monkeypatch, tmp_path, tiny_run, capsys):
  run(monkeypatch, 'report', tiny_run)
  assert capsys.readouterr().out.strip() == str(tiny_run / 'report.html')
  assert '40 images of the split' in (tiny_run / 'report.html').read_text(encoding='utf-8')
  run(monkeypatch, 'report', tiny_run, tiny_run, '--to', tmp_path / 'both.html')
  assert '<title>2 runs</title>' in (tmp_path / 'both.html').read_text(encoding='utf-8')


def test_report_of_what_is_no_run_is_an_error_without_a_page(monkeypatch, tmp_path):
  with pytest.raises(UserError, match='config.json'):
    run(monkeypatch, 'report', tmp_path)
  assert not list(tmp_path.iterdir())


def test_without_bokeh_one_line_says_so_and_nothing_is_written(monkeypatch, tiny_run, capsys):
  for name in [name for name in sys.modules if name.partition('.')[0] == 'bokeh']:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, 'bokeh', None)
  (tiny_run / 'report.html').unlink(missing_ok=True)
  capsys.readouterr()
  write_run_report(tiny_run, Watchdog())
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and 'bokeh' in lines[0]
  assert not (tiny_run / 'report.html').exists()


@pytest.mark.parametrize('labels', [1, 2])
def test_evaluate_writes_a_page_into_a_directory(monkeypatch, tmp_path, labels):
  rng, rows = np.random.default_rng(0), []
  (tmp_path / 'photos').mkdir()
  for i in range(12):
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f'photos/{i}.png')
    rows.append(f'{i}.png,{";".join("abc"[(i + j) % 3] for j in range(labels))}')
  (tmp_path / 'photos/test.csv').write_text('\n'.join(['path,label', *rows]), encoding='utf-8')
  model, names = tmp_path / 'model.npz', tmp_path / 'names.txt'
  google_file(model, ModelConfig(variant='mu/4'), classes=3, size=(16, 16))
  names.write_text('a\nb\nc\n', encoding='utf-8')
  source = ('--data', f'csv:{tmp_path}/photos/test.csv', '--split', 'all', '--labels', names)
  run(monkeypatch, 'evaluate', '--init', model, *source, '--report', tmp_path)
  page = (tmp_path / 'report.html').read_text(encoding='utf-8')
  assert '12 images of the split' in page and 'id="attention-view"' in page
  assert ('class="matrix"' in page) == (labels == 1)


def test_evaluate_refuses_a_report_that_cannot_be_written_before_it_evaluates(
  monkeypatch, tmp_path
):
  with pytest.raises(UserError, match='absent'):
    run(
      monkeypatch, 'evaluate', '--init', 'none.npz', '--data', 'builtin:digits',
      '--report', tmp_path / 'absent' / 'page.html',
    )  # fmt: skip
