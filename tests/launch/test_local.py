"""Real processes on this machine train together, and all end when one of them fails."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax.errors import UserError
from vit_jax.launch.local import find_cause, run_hosts
from vit_jax.metrics.records import read_metrics

ROOT = Path(__file__).parents[2]


def script(tmp_path: Path, text: str) -> list[str]:
  (tmp_path / 'job.py').write_text(
    f'import os, sys, time\nhost = int(os.environ["VIT_JAX_PROCESS"])\n{text}\n', encoding='utf-8'
  )
  return [str(tmp_path / 'job.py')]


def test_lines_start_with_their_host_and_success_of_all_hosts_is_exit_code_0(tmp_path):
  out = io.StringIO()
  assert run_hosts(script(tmp_path, 'print("I am", host)'), hosts=3, devices=0, out=out) == 0
  assert sorted(out.getvalue().splitlines()) == [
    '[host 0] I am 0',
    '[host 1] I am 1',
    '[host 2] I am 2',
  ]


def test_a_host_that_fails_ends_the_others_and_its_exit_code_is_returned(tmp_path):
  out, began = io.StringIO(), time.monotonic()
  job = script(tmp_path, 'if host == 1: raise SystemExit(75)\ntime.sleep(300)')
  assert run_hosts(job, hosts=3, devices=0, out=out) == 75
  assert time.monotonic() - began < 60


def test_a_host_that_is_killed_is_a_failure_too(tmp_path):
  job = script(tmp_path, 'if host == 0: os.kill(os.getpid(), 9)\ntime.sleep(300)')
  assert run_hosts(job, hosts=2, devices=0, out=io.StringIO()) == 128 + 9


def test_a_host_that_lost_another_is_not_the_cause_even_if_it_ends_first(tmp_path):
  job = script(
    tmp_path,
    'if host == 0: raise SystemExit(75)\ntime.sleep(1)\nif host == 1: raise SystemExit(1)\n'
    'time.sleep(300)',
  )
  assert run_hosts(job, hosts=3, devices=0, out=io.StringIO()) == 1


@pytest.mark.parametrize(
  ('failed', 'cause'),
  [
    ({'a': 75, 'b': 1}, 'b'),
    ({'a': 134, 'b': 2, 'c': 76}, 'b'),
    ({'a': 1, 'b': 137}, 'b'),  # The kernel killed b, for example because memory ran out.
    ({'a': 75, 'b': 134}, 'a'),
    ({'a': 1, 'b': 2}, 'a'),
  ],
)
@pytest.mark.parametrize('finished', ['abc', ''])
def test_the_cause_is_a_killed_host_before_a_failed_one_before_one_that_can_restart(
  failed, cause, finished
):
  assert find_cause(failed, list(finished)) == cause


def test_a_command_that_is_not_a_file_is_an_error():
  with pytest.raises(UserError, match='nothing.py'):
    run_hosts(['nothing.py'], hosts=2, devices=0, out=io.StringIO())


def train(workdir: Path, *launcher: str, env: dict[str, str]) -> dict[str, float]:
  """Run a short training job, and return its records."""
  settings = [
    '--config.data.train=builtin:digits',
    '--config.epochs=0',
    '--config.steps=6',
    '--config.optim.warmup=1',
  ]
  settings += ['--config.log_every=1', '--config.model.depth=2', f'--workdir={workdir}']
  command = [sys.executable, *launcher, 'run_pretrain.py', *settings]
  done = subprocess.run(
    command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return read_metrics(workdir)


# Words in the names of what is measured of the machine: times, and the memory in use.
MEASURED = ('second', 'data_wait', 'bytes', 'goodput')


def test_a_run_on_two_hosts_has_the_metrics_of_a_run_on_one(tmp_path):
  flags = {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  launcher = [
    '-m',
    'vit_jax',
    'launch',
    '--backend=local',
    '--hosts=2',
    '--devices_per_host=4',
    '--',
  ]
  one, two = train(tmp_path / 'one', env=flags), train(tmp_path / 'two', *launcher, env={})
  assert len(one) == len(two)
  for ours, theirs in zip(one, two, strict=True):
    assert ours.pop('kind') == theirs.pop('kind')
    numbers = [
      {name: x for name, x in row.items() if not any(word in name for word in MEASURED)}
      for row in (ours, theirs)
    ]
    assert len(numbers[0]) > 1  # Besides the step.
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


# The tests themselves may have been started with nohup, whose children ignore SIGHUP.
WITH_SIGHUP = (
  'import runpy, signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); '
  'runpy.run_module("vit_jax", run_name="__main__", alter_sys=True)'
)


def launch(*job: str, **kwargs) -> subprocess.Popen:
  command = ['-c', WITH_SIGHUP, 'launch', '--backend=local', '--hosts=2', '--', *job]
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  return subprocess.Popen([sys.executable, *command], env=env, cwd=ROOT, **kwargs)


def test_hosts_do_not_block_if_nothing_reads_their_output(tmp_path):
  (tmp_path / 'ended').mkdir()
  ended = tmp_path / 'ended'
  job = script(
    tmp_path,
    f'for i in range(20000): print("a line of a host", i)\nopen(f"{ended}/{{host}}", "w")',
  )
  process = launch(*job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  process.stdout.readline()
  process.stdout.close()
  assert process.wait() == 0
  assert {path.name for path in ended.iterdir()} == {'0', '1'}


def test_sighup_is_sent_to_all_hosts(tmp_path):
  job = script(
    tmp_path,
    'import signal\nsignal.signal(signal.SIGHUP, lambda *_: sys.exit(75))\n'
    'print("ready", flush=True)\ntime.sleep(300)',
  )
  process = launch(*job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  seen = b''
  while seen.count(b'ready') < 2:
    seen += process.stdout.readline()
  process.send_signal(signal.SIGHUP)
  out, _ = process.communicate(timeout=50)
  assert process.returncode == 128 + signal.SIGHUP, seen + out
