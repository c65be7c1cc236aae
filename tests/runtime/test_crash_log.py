"""Starts that end in an error are counted, each once; starts that were killed or preempted, or got on, are not."""

import pytest

from vit_jax.errors import CrashLoopError, DivergedError, UserError
from vit_jax.runtime.crash_log import MAX_FAILED_STARTS, CrashLog


def start(workdir, step, error=None, hosts=1):
  """One start of all hosts from `step`, which ends in `error` on each."""
  all_hosts = [CrashLog(workdir, host=host) for host in range(hosts)]
  for failures in all_hosts:
    failures.register_start(step)
  for failures in all_hosts if error else []:
    with pytest.raises(type(error)), failures.record_errors():
      raise error


def test_after_three_errors_from_one_checkpoint_a_start_is_refused_and_the_evidence_kept(tmp_path):
  for i in range(MAX_FAILED_STARTS):
    start(tmp_path, 20, ZeroDivisionError(f'number {i}'), hosts=2)
  with pytest.raises(CrashLoopError, match=f'step 20 .*{tmp_path / "failures"}'):
    start(tmp_path, 20)
  kept = {path.name: path.read_text() for path in (tmp_path / 'failures').iterdir()}
  assert kept.keys() == {f'20-{i}-host{host}.txt' for i in (1, 2, 3) for host in (0, 1)}
  assert (
    'ZeroDivisionError: number 2' in kept['20-3-host1.txt'] and 'in start' in kept['20-3-host1.txt']
  )


def test_a_new_checkpoint_starts_the_count_anew(tmp_path):
  for step in (20, 20, 40, 40, 60):
    start(tmp_path, step, ZeroDivisionError())
  start(tmp_path, 60)
  assert (tmp_path / 'failures' / '60-1-host0.txt').exists()


@pytest.mark.parametrize(
  'error',
  [
    UserError('mend me'),
    ValueError('UNKNOWN: Gloo all-reduce failed: Connection closed by peer'),
    SystemExit(75),
  ],
)
def test_what_is_no_error_of_this_run_is_not_counted(tmp_path, error):
  for _ in range(2 * MAX_FAILED_STARTS):
    start(tmp_path, 20, error)
  assert not (tmp_path / 'failures').exists()


def test_numbers_that_are_not_finite_are_counted(tmp_path):
  start(tmp_path, 20, DivergedError('not finite'))
  assert (tmp_path / 'failures' / '20-1-host0.txt').read_text() == 'not finite\n'


def test_where_nothing_can_be_written_the_error_itself_comes_through(tmp_path):
  (tmp_path / 'failures').write_text('in the way')
  start(tmp_path, 0, ZeroDivisionError())
  assert (tmp_path / 'failures').read_text() == 'in the way'
