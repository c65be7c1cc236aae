"""Traces of steps, read back from the files that TensorBoard reads."""

import gzip
import json
import shutil
import signal

import jax
import pytest

from tests.runs import Run
from tests.test_train import CONFIG, bits, changed
from vit_jax.errors import UserError
from vit_jax.runtime.profiler import REQUESTED_STEPS, publish_trace
from vit_jax.train import train

SHORT = changed(CONFIG, steps=8, log_ids=False)


def traces(workdir) -> list[str]:
  """Return the names of the traces of a run."""
  return sorted(path.name for path in (workdir / 'tensorboard' / 'plugins' / 'profile').glob('*'))


def read_events(workdir, trace: str, host: int = 0) -> list[dict]:
  """Return the events of a trace in the JSON of Chrome's trace viewer."""
  path = workdir / 'tensorboard' / 'plugins' / 'profile' / trace / f'host{host}.trace.json.gz'
  return json.loads(gzip.decompress(path.read_bytes()))['traceEvents']


def step_numbers(events: list[dict]) -> list[int]:
  """Return the numbers of the steps that a trace names."""
  steps = [event for event in events if event.get('name') == 'train']
  return sorted(int(event['args']['step_num']) for event in steps)


@pytest.fixture(scope='module')
def traced(tmp_path_factory):
  """Return the directory of a run that has traced its steps 4, 5 and 6."""
  workdir = tmp_path_factory.mktemp('traced') / 'run'
  train(changed(SHORT, profile='4:7'), workdir)
  return workdir


def test_a_trace_has_the_chosen_steps_and_the_names_of_our_functions(traced):
  assert traces(traced) == ['steps_4-6']
  events = read_events(traced, 'steps_4-6')
  assert step_numbers(events) == [4, 5, 6]
  names = {event.get('name', '') for event in events}
  modules = {event.get('args', {}).get('hlo_module') for event in events}
  assert 'jit_train_step' in modules
  assert {'next_batch', 'StepLog.write_summary', 'Evaluations.run_due', 'save_checkpoint'} <= names


def test_the_protobuf_of_a_trace_has_the_operations_of_the_train_step(traced):
  path = traced / 'tensorboard' / 'plugins' / 'profile' / 'steps_4-6' / 'host0.xplane.pb'
  data = jax.profiler.ProfileData.from_file(str(path))
  stats = [
    dict(event.stats) for plane in data.planes for line in plane.lines for event in line.events
  ]
  assert any(each.get('hlo_module') == 'jit_train_step' for each in stats)


def test_a_trace_changes_no_result(traced, tmp_path):
  train(SHORT, tmp_path / 'run')
  assert bits(tmp_path / 'run') == bits(traced)
  assert not traces(tmp_path / 'run')


def test_a_run_that_resumes_traces_the_chosen_steps_that_it_takes(traced, tmp_path):
  shutil.copytree(traced, tmp_path / 'run', ignore=shutil.ignore_patterns('5', '6', '7', '8'))
  train(changed(SHORT, profile='4:7'), tmp_path / 'run')
  assert traces(tmp_path / 'run') == ['steps_4-6', 'steps_5-6']
  assert step_numbers(read_events(tmp_path / 'run', 'steps_5-6')) == [5, 6]
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '8')
  train(changed(SHORT, profile='1:3'), tmp_path / 'run')  # Taken before: nothing to trace.
  assert traces(tmp_path / 'run') == ['steps_4-6', 'steps_5-6']


def test_steps_beyond_the_end_of_a_run_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"config.profile='8:10' ends with step 9, .* 8 steps"):
    train(changed(SHORT, profile='8:10'), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_trace_that_fails_is_a_line_and_the_run_completes(tmp_path, capsys):
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(str(tmp_path / 'other'), profiler_options=options):
    result = train(changed(SHORT, profile='4:7'), tmp_path / 'run')
  assert result['step'] == 8 and not traces(tmp_path / 'run')
  lines = [line for line in capsys.readouterr().err.splitlines() if 'no trace of' in line]
  assert len(lines) == 1 and lines[0].startswith('no trace of steps 4 to 6: ')


def test_a_second_trace_of_the_same_steps_does_not_replace_the_first(tmp_path):
  (tmp_path / 'logdir').mkdir()
  written = tmp_path / 'from_jax' / 'plugins' / 'profile' / 'now'
  written.mkdir(parents=True)
  for content in ('first', 'second'):
    (written / 'a.host.name.xplane.pb').write_text(content)
    publish_trace(tmp_path / 'from_jax', tmp_path / 'logdir', range(4, 7), 1)
  profile = tmp_path / 'logdir' / 'plugins' / 'profile'
  texts = {str(path.relative_to(profile)): path.read_text() for path in profile.rglob('*.pb')}
  assert texts == {'steps_4-6/host1.xplane.pb': 'first', 'steps_4-6_2/host1.xplane.pb': 'second'}


def test_a_run_directory_that_is_gone_is_not_created_again(tmp_path):
  (tmp_path / 'from_jax').mkdir()
  (tmp_path / 'from_jax' / 'name.xplane.pb').touch()
  with pytest.raises(FileNotFoundError):
    publish_trace(tmp_path / 'from_jax', tmp_path / 'run' / 'tensorboard', range(4, 7), 0)
  assert not (tmp_path / 'run').exists()


def test_two_hosts_trace_the_same_steps_by_config_and_on_a_signal_to_one_of_them(tmp_path):
  flags = ('--config.steps=200', '--config.profile=3:5')
  with Run(tmp_path / 'run', *flags, hosts=2, devices=1) as run:
    run.until('step 10/200')
    run.send(signal.SIGUSR1, host=1)
    assert run.codes() == [0, 0], run.text()[-3000:]
    (line,) = [line for line in run.text().splitlines() if 'traced steps 3 to 4 into' in line]
    assert line.endswith('tensorboard/plugins/profile/steps_3-4')
  requested = next(name for name in traces(tmp_path / 'run') if name != 'steps_3-4')
  first = int(requested.removeprefix('steps_').partition('-')[0])
  for host in (0, 1):
    assert step_numbers(read_events(tmp_path / 'run', 'steps_3-4', host)) == [3, 4]
    events = read_events(tmp_path / 'run', requested, host)
    assert step_numbers(events) == list(range(first, first + REQUESTED_STEPS))
    assert 'jit_train_step' in {event.get('args', {}).get('hlo_module') for event in events}
    assert {'next_batch', 'save_checkpoint'} & {event.get('name') for event in events}
