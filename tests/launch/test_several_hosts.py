"""`launch --backend=local` in real processes: all hosts end if one fails, and the doctor runs."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax.metrics.records import read_metrics

ROOT = Path(__file__).parents[2]


def launch(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  environment |= {
    'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'compiled'),
  }
  command = [sys.executable, '-m', 'vit_jax', 'launch', '--backend=local', *args]
  return subprocess.run(
    command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=1500
  )


MEET = """
import os, signal, sys
sys.path.insert(0, {root!r})
from vit_jax.runtime.cluster import exit_on_error, initialize_cluster
env = os.environ
own = dict(processes=int(env['VIT_JAX_PROCESSES']), process_id=int(env['VIT_JAX_PROCESS']), timeout=60)
initialize_cluster(coordinator=env['VIT_JAX_COORDINATOR'], **own)
import jax
from jax.experimental.multihost_utils import sync_global_devices
with exit_on_error(jax.process_count()):
  sync_global_devices('start')
  print('started', flush=True)
  if jax.process_index() == 1:
    {what}
  sync_global_devices('end')
"""
ENDS = {
  'an error': ("raise ValueError('of this host')", 1, 'ValueError: of this host'),
  'a user error': (
    "from vit_jax.errors import UserError; raise UserError('wrong value')",
    2,
    'error: wrong value',
  ),
  'a kill': ('os.kill(os.getpid(), signal.SIGKILL)', 137, 'started'),
}


@pytest.mark.parametrize('case', ENDS)
def test_a_host_that_fails_ends_the_others_and_launch_exits_with_its_exit_code(tmp_path, case):
  what, code, words = ENDS[case]
  (tmp_path / 'meet.py').write_text(MEET.format(root=str(ROOT), what=what), encoding='utf-8')
  began = time.monotonic()
  done = launch('--', str(tmp_path / 'meet.py'))
  assert done.returncode == code, done.stdout + done.stderr
  assert {'[host 0] started', '[host 1] started', f'[host 1] {words}'} <= set(
    done.stdout.splitlines()
  )
  assert done.stderr == f'host 1 ended with exit code {code}\n'
  assert time.monotonic() - began < 120  # A host that hangs would take 300 s.


def test_ctrl_c_is_passed_to_every_host(tmp_path):
  (tmp_path / 'wait.py').write_text(
    """
import time
try:
  print('started', flush=True)
  time.sleep(300)
except KeyboardInterrupt:
  print('interrupted', flush=True)
""",
    encoding='utf-8',
  )
  command = [sys.executable, '-m', 'vit_jax', 'launch', '--', str(tmp_path / 'wait.py')]
  with subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    started = {process.stdout.readline(), process.stdout.readline()}
    process.send_signal(2)
    out, err = process.communicate(timeout=60)
  assert started == {'[host 0] started\n', '[host 1] started\n'}
  assert set(out.splitlines()) == {'[host 0] interrupted', '[host 1] interrupted'}
  assert (process.returncode, err) == (130, '')


def test_the_doctor_checks_two_hosts_and_reports_empty_data_folders(tmp_path):
  (tmp_path / 'data').mkdir()
  args = (
    '--',
    '-m',
    'vit_jax',
    'doctor',
    f'--workdir={tmp_path / "run"}',
    f'--data={tmp_path / "data"}',
    '--devices=4',
  )
  done = launch('--devices_per_host=2', *args)
  lines = [line.removeprefix('[host 0] ') for line in done.stdout.splitlines()]
  findings = {line.split()[1]: line for line in lines if line.startswith(('ok ', 'FAIL '))}
  assert done.returncode == 1, done.stdout + done.stderr
  assert findings.keys() == {
    'versions',
    'devices',
    'all-reduce',
    'workdir',
    'data',
    'disk',
    'hugepages',
    'clocks',
  }
  assert findings['devices'] == 'ok   devices    4 x cpu on 2 hosts'
  assert findings['all-reduce'] == 'ok   all-reduce the sum over 4 devices is 6'
  assert findings['workdir'].endswith('run is writable and readable on all hosts')
  assert re.fullmatch(
    r'FAIL data .*: host 0: is empty; host 1: is empty  → mount the bucket .*', findings['data']
  )
  assert not list((tmp_path / 'run').iterdir())


@pytest.mark.slow
def test_two_hosts_pre_train_the_quickstart_to_the_accuracy_of_one(tmp_path):
  for hosts in (1, 2):
    shape = (f'--hosts={hosts}', f'--devices_per_host={2 // hosts}')
    done = launch(
      *shape, f'--workdir={tmp_path / str(hosts)}', '--', 'run_pretrain.py', '--config.log_every=10'
    )
    assert done.returncode == 0, done.stdout + done.stderr
  one, two = (read_metrics(tmp_path / str(hosts)) for hosts in (1, 2))
  losses = [[record['loss'] for record in records if 'loss' in record] for records in (one, two)]
  assert losses[1][:5] == pytest.approx(losses[0][:5], rel=1e-4)
  accuracies = [
    [record['test_accuracy'] for record in records if 'test_accuracy' in record][-1]
    for records in (one, two)
  ]
  assert accuracies[0] > 0.86
  assert accuracies[1] == pytest.approx(accuracies[0], abs=0.005)
