"""Checkpoints under damage, full, unwritable, failing and slow storage, kills and clock jumps."""

import contextlib
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.soak.damage import (
  IGNORE_UNAWAITED_FUTURES,
  checkpoint_damages,
  flip_bit,
  restore_outcome,
  save_three_checkpoints,
)
from tests.soak.saver import make_state, state_shapes, states_equal
from vit_jax.checkpoint import io, manager
from vit_jax.checkpoint.io import CorruptCheckpointError
from vit_jax.checkpoint.manager import CheckpointManager, list_saved_steps, load_newest_params
from vit_jax.errors import StorageError, UserError
from vit_jax.runtime import files

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(IGNORE_UNAWAITED_FUTURES)


@pytest.fixture(autouse=True)
def collect_garbage():
  """Let Orbax's warnings about unawaited coroutines appear here, and not in a later test."""
  yield
  gc.collect()


@pytest.fixture(scope='module')
def intact_run(tmp_path_factory):
  """Return a run with three checkpoints, which tests do not change."""
  workdir = tmp_path_factory.mktemp('intact') / 'run'
  save_three_checkpoints(workdir, 0.1)
  return workdir


@pytest.fixture
def run(intact_run, tmp_path):
  """Return a copy of `intact_run`."""
  shutil.copytree(intact_run, tmp_path / 'run')
  return tmp_path / 'run'


@pytest.fixture
def small_disk(tmp_path):
  """Mount a file system of 24 MiB."""
  path = tmp_path / 'small'
  path.mkdir()
  try:
    mount('-t', 'tmpfs', '-o', 'size=24m', 'tmpfs', path)
  except (subprocess.CalledProcessError, OSError):
    pytest.skip('mounting is not permitted')
  yield path
  subprocess.run(['umount', '-l', path], check=True)


def mount(*args):
  subprocess.run(['mount', *args], check=True, capture_output=True)


@contextlib.contextmanager
def read_only(path):
  """Remount a directory read-only, because root ignores permissions."""
  mount('--bind', path, path)
  mount('-o', 'remount,bind,ro', path)
  yield
  subprocess.run(['umount', '-l', path], check=True)


@contextlib.contextmanager
def open_manager(workdir, **options):
  """Open a manager that releases the directory even if the test fails."""
  checkpoints = CheckpointManager(workdir, **options)
  try:
    yield checkpoints
  finally:
    with contextlib.suppress(UserError):
      checkpoints.close()


def largest_file(checkpoint: Path) -> Path:
  return max(
    (path for path in checkpoint.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size
  )


def flip_array_bit(checkpoint: Path):
  """Flip one bit of the arrays."""
  flip_bit(largest_file(checkpoint), 8 * 5000 + 3)


def names(workdir: Path) -> set[str]:
  return {path.name for path in (workdir / 'checkpoints').iterdir()}


def wait_for_stderr(checkpoints: CheckpointManager, capfd) -> str:
  """Call `check_for_errors` until it prints, and return the text."""
  end, text = time.monotonic() + 60, ''
  while not text and time.monotonic() < end:
    checkpoints.check_for_errors()
    text += capfd.readouterr().err
  return text


def test_damage_of_every_kind_is_detected(intact_run):
  """Try 40 of the cases of soak/test_damage.py."""
  rng = random.Random(1)
  cases = rng.sample(list(checkpoint_damages(intact_run / 'checkpoints' / '3', rng, flips=4)), 40)
  states = {step: make_state(step) for step in (1, 2, 3)}
  outcomes = {
    name: restore_outcome(intact_run, damage, states, state_shapes()) for name, damage in cases
  }
  assert set(outcomes.values()) == {'step 2, exact', 'step 3, exact'}, outcomes


def test_the_newest_intact_checkpoint_is_restored_and_damaged_ones_are_quarantined(run, capfd):
  flip_array_bit(run / 'checkpoints' / '3')
  (run / 'checkpoints' / '2' / 'commit_success.txt').unlink()
  with open_manager(run) as checkpoints:
    assert states_equal(checkpoints.restore(state_shapes())[0], make_state(1))
    checkpoints.save(make_state(2), 2)
  text = capfd.readouterr().err
  assert '3 is damaged: params/head/kernel' in text and 'commit_success.txt' in text
  assert str(run / 'checkpoints' / 'damaged' / '3') in text
  assert names(run) == {'2', 'damaged'}  # One is retained; damaged ones are never deleted.
  assert {path.name for path in (run / 'checkpoints' / 'damaged').iterdir()} == {'2', '3'}


def test_a_run_with_only_damaged_checkpoints_does_not_start_from_scratch(run):
  for step in '123':
    flip_array_bit(run / 'checkpoints' / step)
  for _ in range(2):
    with (
      open_manager(run) as checkpoints,
      pytest.raises(UserError, match='checkpoints .*--workdir'),
    ):
      checkpoints.restore(state_shapes())
  assert names(run) == {'1', '2', '3'}
  (run / 'checkpoints' / 'damaged').mkdir()
  for step in '123':
    shutil.rmtree(run / 'checkpoints' / step)
  with open_manager(run) as checkpoints, pytest.raises(UserError, match='checkpoints .*--workdir'):
    checkpoints.restore(state_shapes())


def test_load_newest_params_rejects_a_damaged_checkpoint(run):
  assert load_newest_params(run)[1] == 3
  flip_array_bit(run / 'checkpoints' / '3')
  with pytest.raises(UserError, match='3 is damaged: params/head/kernel.* verify'):
    load_newest_params(run)
  assert names(run) == {'1', '2', '3'}


def test_only_leftovers_of_interrupted_saves_and_deletions_are_removed(run):
  directory = run / 'checkpoints'
  shutil.copytree(directory / '1', directory / '4.orbax-checkpoint-tmp')
  shutil.copytree(directory / '1', directory / '0.deleted')
  (directory / 'mine').mkdir()
  with open_manager(run):
    assert names(run) == {'1', '2', '3', 'mine'}


def test_saving_an_older_step_is_an_error_and_the_newest_step_is_not_saved_again(run):
  with open_manager(run, max_to_keep=3) as checkpoints:
    with pytest.raises(ValueError, match='step 2'):
      checkpoints.save(make_state(2), 2)
    checkpoints.save(make_state(7), 3)
    checkpoints.finish(make_state(7), 3)
  with open_manager(run) as checkpoints:
    assert states_equal(checkpoints.restore(state_shapes())[0], make_state(3))


def test_retention_counts_checkpoints_of_earlier_starts(tmp_path):
  for first in (0, 4, 8):
    with open_manager(tmp_path, max_to_keep=2, keep_every=3) as checkpoints:
      for step in range(first + 1, first + 5):
        checkpoints.save(make_state(step), step)
  assert names(tmp_path) == {'3', '6', '9', '11', '12'}


def test_a_save_is_not_affected_by_donating_the_state_afterwards(tmp_path):
  update = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1 if x.ndim else x, state), donate_argnums=0
  )
  state, expected = make_state(1, 4), {}
  with open_manager(tmp_path, max_to_keep=9) as checkpoints:
    for step in range(1, 5):
      expected[step] = jax.tree.map(np.array, jax.device_get(state))
      checkpoints.save(state, step)
      state = update(update(state))
  for step, state in expected.items():
    got = io.read_checkpoint_as_numpy(tmp_path / 'checkpoints' / str(step))
    assert got['params']['head']['kernel'].tobytes() == state.params['head']['kernel'].tobytes()


def test_a_non_finite_state_is_never_saved(tmp_path):
  state = make_state(1)
  with open_manager(tmp_path, max_to_keep=9) as checkpoints:
    checkpoints.save(state, 1)
    bad = state.replace(
      opt_state=(
        {'momentum': state.opt_state[0]['momentum'].at[3].set(jnp.inf)},
        None,
        jnp.int32(1),
      )
    )
    checkpoints.save(bad, 2)
    with pytest.raises(
      UserError,
      match='2 .*not finite: 9 elements, first in opt_state/0/mom',
    ):
      checkpoints.finish(state, 3)
  assert list_saved_steps(tmp_path / 'checkpoints') == [1]


def test_a_full_disk_is_reported_and_saving_resumes_once_it_has_space(small_disk, capfd):
  with open_manager(small_disk, max_to_keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(make_state(step, 4), step)
    checkpoints.save(make_state(3, 4), 3)
    time.sleep(1)
    ballast = small_disk / 'ballast'
    with contextlib.suppress(OSError):
      ballast.write_bytes(bytes(24 * 2**20))
    for step in (4, 5):
      checkpoints.save(make_state(step, 4), step)
      assert f'{step} could not be saved: ' in wait_for_stderr(checkpoints, capfd)
    assert sorted(list_saved_steps(small_disk / 'checkpoints')) == [2, 3]
    ballast.unlink()
    for step in (6, 7):
      checkpoints.save(make_state(step, 4), step)
  assert names(small_disk) == {'6', '7'}
  with open_manager(small_disk) as checkpoints:
    assert states_equal(checkpoints.restore(state_shapes(4))[0], make_state(7, 4))


def test_three_failed_saves_end_the_run(small_disk):
  with open_manager(small_disk) as checkpoints:
    checkpoints.save(make_state(1), 1)
    checkpoints.close()
  with open_manager(small_disk) as checkpoints, read_only(small_disk):
    with pytest.raises(StorageError, match='3 .*Read-only'):
      for step in range(2, 9):
        checkpoints.save(make_state(step), step)
    assert step == 5
  with open_manager(small_disk) as checkpoints:
    assert states_equal(checkpoints.restore(state_shapes())[0], make_state(1))


@pytest.mark.parametrize('failures', [1, 3, 4])
def test_the_last_save_is_attempted_four_times(tmp_path, monkeypatch, failures):
  left = [failures]

  def fail(*args):
    left[0] -= 1
    if left[0] >= 0:
      raise OSError(5, 'Input/output error')
    return original(*args)

  original = io.format_manifest
  monkeypatch.setattr(io, 'format_manifest', fail)
  monkeypatch.setattr(manager, 'RETRY_DELAYS', (0.01,) * 3)
  monkeypatch.setattr(manager, 'MAX_FAILED_SAVES', 9)
  checkpoints = CheckpointManager(tmp_path)
  if failures < 4:
    checkpoints.finish(make_state(1), 1)
    assert names(tmp_path) == {'1'}
    return
  with pytest.raises(StorageError, match='1 .*: Input/output error'):
    checkpoints.finish(make_state(1), 1)
  assert names(tmp_path) == set()


def test_unresponsive_storage_is_an_error_and_not_a_hang(tmp_path, monkeypatch):
  ended = threading.Event()
  original = io.format_manifest
  monkeypatch.setattr(io, 'format_manifest', lambda *args: ended.wait(30) and original(*args))
  monkeypatch.setattr(manager, 'SAVE_TIMEOUT', 0.5)
  with open_manager(tmp_path) as checkpoints:
    checkpoints.save(make_state(1), 1)
    with pytest.raises(StorageError, match='checkpoints/1 '):
      checkpoints.save(make_state(2), 2)
    ended.set()
    monkeypatch.setattr(manager, 'SAVE_TIMEOUT', 30)


def test_failing_storage_is_distinguished_from_damage(run, monkeypatch):
  """Orbax raises the same errors for both."""

  def fail(*args, **kwargs):
    raise ValueError('UNAVAILABLE: error reading file')

  monkeypatch.setattr(files, 'RETRY_DELAYS', (0.01,) * 3)
  monkeypatch.setattr(io.ocp.PyTreeCheckpointHandler, 'restore', fail)
  with pytest.raises(CorruptCheckpointError, match='UNAVAILABLE'):
    io.read_checkpoint_as_numpy(run / 'checkpoints' / '3')

  def unreadable(path):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(Path, 'read_bytes', unreadable)
  with (
    open_manager(run) as checkpoints,
    pytest.raises(StorageError, match='reading .*: Input/output error'),
  ):
    checkpoints.restore(state_shapes())
  assert names(run) == {'1', '2', '3'}


@pytest.mark.parametrize('jump', [3600, -3600])
def test_clock_jumps_do_not_affect_saving(tmp_path, monkeypatch, jump):
  clock, began = time.time, time.time()
  monkeypatch.setattr(time, 'time', lambda: clock() + (jump if clock() > began + 0.3 else 0))
  monkeypatch.setattr(time, 'time_ns', lambda: int(time.time() * 1e9))
  for first in (1, 4):
    with open_manager(tmp_path, max_to_keep=2) as checkpoints:
      restored = checkpoints.restore(state_shapes())
      assert restored is None or states_equal(restored[0], make_state(3))
      for step in range(first, first + 3):
        checkpoints.save(make_state(step), step)
        time.sleep(0.1)
  assert names(tmp_path) == {'5', '6'}


def test_killed_trainers_lose_no_checkpoint(tmp_path):
  """Play 6 rounds of soak/test_kills.py."""
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(jax.config.jax_compilation_cache_dir),
  }
  command = [sys.executable, 'tests/soak/saver.py', str(tmp_path), '6', '0', '1']
  result = json.loads(
    subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
  )
  assert (result['lost'], result['wrong']) == (0, 0)
  assert result['saved'] > 0 and len(result['verified']) >= 2
