"""The page as text: names are escaped, nothing is loaded, and missing parts leave a note."""

import dataclasses
import html
import json
import shlex
import shutil
from html.parser import HTMLParser

import pytest

from tests.report.conftest import HOSTILE_NAMES
from vit_jax.cli.jobs import parse_config_flags
from vit_jax.cli.report import write_run_report
from vit_jax.report import build
from vit_jax.report.build import report_comparison, report_run
from vit_jax.report.charts import MAX_POINTS, choose_panels, draw_curves
from vit_jax.report.page import render_page, write_page
from vit_jax.report.run_facts import equivalent_command, list_warnings, read_run
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.settings.fields import config_to_dict

MAX_PAGE_BYTES = 8 * 2**20


class Elements(HTMLParser):
  """The elements of a page: (tag, attributes), and the content of each script."""

  def __init__(self, page: str):
    super().__init__()
    self.found, self.scripts, self._in_script = [], [], False
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))
    self._in_script = tag == 'script'
    if self._in_script:
      self.scripts.append('')

  def handle_endtag(self, tag):
    self._in_script = False

  def handle_data(self, data):
    if self._in_script:
      self.scripts[-1] += data


@pytest.fixture(scope='session')
def page(hostile_run) -> str:
  """Return the page of the run with hostile names."""
  return render_page(report_run(hostile_run))


def test_hostile_names_are_text_alone(page, hostile_run):
  parsed = Elements(page)
  nonces = {attrs.get('nonce') for tag, attrs in parsed.found if tag == 'script'} - {None}
  assert len(nonces) == 1
  assert len(parsed.scripts) == 4  # The data, BokehJS, the charts, report.js.
  assert not [name for _, attrs in parsed.found for name in attrs if name.startswith('on')]
  assert not [attrs for tag, attrs in parsed.found if tag == 'b' and attrs]
  text = html.unescape(page)
  for name in HOSTILE_NAMES:
    assert name.replace('/', '\N{DIVISION SLASH}') in text
  assert '49 & \N{ROCKET}' not in page  # Names are not templates.
  assert html.escape(hostile_run.name, quote=False) in page


def test_the_page_loads_nothing(page):
  for tag, attrs in Elements(page).found:
    for name in ('src', 'href', 'action', 'data', 'poster', 'srcset'):
      assert str(attrs.get(name, 'data:')).startswith('data:'), (tag, attrs)
  assert "default-src 'none'" in page
  assert len(page.encode()) <= MAX_PAGE_BYTES


def test_the_page_has_the_numbers_of_the_run(page, hostile_run):
  records = [
    json.loads(line) for line in (hostile_run / 'metrics.jsonl').read_text('utf-8').splitlines()
  ]
  accuracy = next(r['val_accuracy'] for r in reversed(records) if 'val_accuracy' in r)
  assert f'<dd>{accuracy:.2%}</dd>' in page
  assert f'{accuracy:.2%} are classified correctly; most frequent class: 20.00%' in page
  for heading in (
    'Curves',
    'Classes',
    'Confusions',
    'Calibration',
    'Attention',
    'What the model saw',
  ):
    assert f'<h2>{heading}</h2>' in page


def test_saved_predictions_and_a_new_evaluation_give_the_same_page(hostile_run, tmp_path):
  again = tmp_path / hostile_run.name
  shutil.copytree(hostile_run, again)
  (again / 'predictions.npz').unlink()
  saved, evaluated = report_run(hostile_run), report_run(again)
  assert repr(saved.predictions.rows) == repr(evaluated.predictions.rows)  # NaN is not NaN.
  assert saved.predictions.places == evaluated.predictions.places
  assert saved.pictures == evaluated.pictures
  (again / 'predictions.npz').write_bytes(b'damaged')
  assert repr(report_run(again).predictions.rows) == repr(saved.predictions.rows)


def test_a_large_split_is_sampled_and_the_page_says_so(hostile_run, tmp_path, monkeypatch):
  again = tmp_path / 'run'
  shutil.copytree(hostile_run, again)
  (again / 'predictions.npz').unlink()
  monkeypatch.setattr(build, 'MAX_EVALUATED', 7)
  found = report_run(again)
  assert found.predictions.examples == 7
  assert any('of 7 of 20 images' in note for note in found.notes)
  # Evenly spaced over the 20 images, as np.linspace(0, 19, 7) truncated.
  assert set(found.predictions.places) == {0, 3, 6, 9, 12, 15, 19}


def test_without_data_the_page_has_curves_numbers_and_a_note(hostile_run, tmp_path):
  again = tmp_path / 'run'
  shutil.copytree(hostile_run, again)
  config = json.loads((again / 'config.json').read_text(encoding='utf-8'))
  config['data']['train'] = 'folder:/absent/photos'
  (again / 'config.json').write_text(json.dumps(config), encoding='utf-8')
  found = report_run(again)
  assert any('/absent/photos' in note for note in found.notes)
  assert found.curves and found.predictions.rows and not found.pictures and not found.batch
  assert '<h2>Classes</h2>' in render_page(found)


def test_several_runs_show_the_settings_that_differ(hostile_run, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(hostile_run, other)
  config = json.loads((other / 'config.json').read_text(encoding='utf-8'))
  config['optim']['lr'] = 0.25
  (other / 'config.json').write_text(json.dumps(config), encoding='utf-8')
  found = report_comparison([hostile_run, other])
  tables = {table.caption: table.rows for table in found.comparison}
  assert tables['Settings that differ'] == [('optim.lr', ['0.001', '0.25'])]
  numbers = dict(tables['Last numbers'])
  assert numbers['steps'] == ['4', '4']
  text = render_page(found)
  assert Elements(text).scripts and '<script>alert(5)' not in text


def test_the_command_gives_the_config_of_the_run(hostile_run):
  config = read_run(hostile_run).config
  words = shlex.split(' '.join(equivalent_command(config)))
  assert words[:2] == ['vit-jax', 'train']
  assert config_to_dict(parse_config_flags(words[2:])) == config_to_dict(config)


def test_an_error_of_the_report_is_one_line_and_the_run_stays_complete(tmp_path, capsys):
  write_run_report(tmp_path / 'absent', Watchdog())
  out = capsys.readouterr().err.splitlines()
  assert len(out) == 1 and 'there is no report' in out[0] and 'config.json' in out[0]


def test_warnings_name_skipped_steps_unreadable_images_and_crashes(tmp_path):
  (tmp_path / 'failures').mkdir()
  (tmp_path / 'failures' / '3-1-host0.txt').write_text('error', encoding='utf-8')
  records = [
    {'step': 7, 'kind': 'bad_step', 'left_out': 'not_finite', 'ids': [1]},
    {'step': 9, 'kind': 'bad_step', 'left_out': 'spikes', 'ids': [2]},
    {'step': 9, 'kind': 'unreadable', 'unreadable': [4, 5]},
    {'step': 10, 'kind': 'unreadable', 'unreadable': [5]},
  ]
  found = ' | '.join(list_warnings(tmp_path, records, [12]))
  for part in ('2 steps', 'step 7', 'not finite', '2 training images', '1 lines', '1 times'):
    assert part in found
  assert not list_warnings(tmp_path / 'absent', [], [])


def test_the_summary_states_the_goodput_of_the_whole_life(page, hostile_run):
  lines = (hostile_run / 'goodput.jsonl').read_text('utf-8').splitlines()
  first, ready, *_, last = parsed = [*map(json.loads, lines)]
  done = next(line for line in parsed if line['step'] == last['step'])  # The last new step.
  share = (done['seconds'] - ready['seconds']) / (last['time'] - first['time'])
  assert f'Goodput {share:.1%}: of ' in page and 'with 1 start, the run spent' in page


def test_each_metric_has_one_panel_and_panels_without_metrics_are_absent():
  panels = choose_panels(['loss', 'lr', 'val_loss', 'val_accuracy_top5', 'fewshot/a_5shot'])
  assert panels == {
    'Loss': ['loss', 'val_loss'],
    'Accuracy': ['val_accuracy_top5'],
    'Learning rate': ['lr'],
    'Probes': ['fewshot/a_5shot'],
  }


def test_a_long_curve_is_thinned_with_its_ends():
  records = [{'step': i, 'kind': 'train', 'loss': 1.0 / i} for i in range(1, 5001)]
  records.append({'step': 5001, 'kind': 'train', 'loss': 'nan'})  # It cannot be drawn.
  (chart,) = draw_curves({'run': records})
  steps = chart.figure.renderers[0].data_source.data['step']
  assert len(steps) == MAX_POINTS and (steps[0], steps[-1]) == (1, 5000)


def test_a_name_that_is_not_unicode_does_not_prevent_the_page(hostile_run, tmp_path):
  found = dataclasses.replace(report_comparison([hostile_run]), title='caf\udce9')
  write_page(found, tmp_path / 'page.html')
  assert '<title>caf?</title>' in (tmp_path / 'page.html').read_text(encoding='utf-8')
