"""Crashed starts are counted once each; kills, preemptions and progress are not counted."""

import pytest

from vit_jax.errors import CrashLoopError, DivergedError, UserError
from vit_jax.runtime.crash_log import MAX_FAILED_STARTS, CrashLog


def start(workdir, step, error=None, hosts=1):
  """Start a run on all hosts from `step`; it raises `error` on each."""
  all_hosts = [CrashLog(workdir, host=host) for host in range(hosts)]
  for crash_log in all_hosts:
    crash_log.register_start(step)
  for crash_log in all_hosts if error else []:
    with pytest.raises(type(error)), crash_log.record_errors():
      raise error


def test_after_three_crashes_from_one_checkpoint_a_start_is_an_error(tmp_path):
  for i in range(MAX_FAILED_STARTS):
    start(tmp_path, 20, ZeroDivisionError(f'number {i}'), hosts=2)
  with pytest.raises(CrashLoopError, match=f'step 20 .*{tmp_path / "failures"}'):
    start(tmp_path, 20)
  files = {
    path.name: path.read_text(encoding='utf-8') for path in (tmp_path / 'failures').iterdir()
  }
  assert files.keys() == {f'20-{i}-host{host}.txt' for i in (1, 2, 3) for host in (0, 1)}
  assert (
    'ZeroDivisionError: number 2' in files['20-3-host1.txt']
    and 'in start' in files['20-3-host1.txt']
  )


def test_a_new_checkpoint_resets_the_count(tmp_path):
  for step in (20, 20, 40, 40, 60):
    start(tmp_path, step, ZeroDivisionError())
  start(tmp_path, 60)
  assert (tmp_path / 'failures' / '60-1-host0.txt').exists()


@pytest.mark.parametrize(
  'error',
  [
    UserError('of the user'),
    ValueError('UNKNOWN: Gloo all-reduce failed: Connection closed by peer'),
    SystemExit(75),
  ],
)
def test_user_errors_lost_hosts_and_preemptions_are_not_counted(tmp_path, error):
  for _ in range(2 * MAX_FAILED_STARTS):
    start(tmp_path, 20, error)
  assert not (tmp_path / 'failures').exists()


def test_divergence_is_counted(tmp_path):
  start(tmp_path, 20, DivergedError('not finite'))
  assert (tmp_path / 'failures' / '20-1-host0.txt').read_text(encoding='utf-8') == 'not finite\n'


def test_the_crash_is_raised_even_if_it_cannot_be_written(tmp_path):
  (tmp_path / 'failures').write_text('in the way', encoding='utf-8')
  start(tmp_path, 0, ZeroDivisionError())
  assert (tmp_path / 'failures').read_text(encoding='utf-8') == 'in the way'
