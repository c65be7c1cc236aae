"""Checkpoints when something goes wrong: damage, full, unwritable, failing and slow storage, kills, clocks that jump."""

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
def collected():
  """What Orbax leaves unawaited when it fails is told here, and not in another test."""
  yield
  gc.collect()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run with three checkpoints: not to be changed."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  save_three_checkpoints(workdir, 0.1)
  return workdir


@pytest.fixture
def run(whole, tmp_path):
  """A copy of it."""
  shutil.copytree(whole, tmp_path / 'run')
  return tmp_path / 'run'


@pytest.fixture
def small(tmp_path):
  """A file system of 24 MiB."""
  place = tmp_path / 'small'
  place.mkdir()
  try:
    mount('-t', 'tmpfs', '-o', 'size=24m', 'tmpfs', place)
  except (subprocess.CalledProcessError, OSError):
    pytest.skip('mounting is not permitted')
  yield place
  subprocess.run(['umount', '-l', place], check=True)


def mount(*args):
  subprocess.run(['mount', *args], check=True, capture_output=True)


@contextlib.contextmanager
def read_only(place):
  """In here nobody can write there, not even root, to whom permissions are nothing."""
  mount('--bind', place, place)
  mount('-o', 'remount,bind,ro', place)
  yield
  subprocess.run(['umount', '-l', place], check=True)


@contextlib.contextmanager
def opened(workdir, **options):
  """Checkpoints that let go of the directory, whatever happens."""
  checkpoints = CheckpointManager(workdir, **options)
  try:
    yield checkpoints
  finally:
    with contextlib.suppress(UserError):
      checkpoints.close()


def largest(checkpoint: Path) -> Path:
  return max(
    (path for path in checkpoint.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size
  )


def spoil(checkpoint: Path):
  """One bit of the arrays."""
  flip_bit(largest(checkpoint), 8 * 5000 + 3)


def names(workdir: Path) -> set[str]:
  return {path.name for path in (workdir / 'checkpoints').iterdir()}


def told(checkpoints: CheckpointManager, capfd) -> str:
  """What a loop that does nothing but check is told in the end."""
  end, said = time.monotonic() + 60, ''
  while not said and time.monotonic() < end:
    checkpoints.check_for_errors()
    said += capfd.readouterr().err
  return said


def test_every_kind_of_damage_ends_with_an_exact_state(whole):
  """Forty of the cases of soak/test_damage.py."""
  rng = random.Random(1)
  cases = rng.sample(list(checkpoint_damages(whole / 'checkpoints' / '3', rng, flips=4)), 40)
  states = {step: make_state(step) for step in (1, 2, 3)}
  found = {name: restore_outcome(whole, damage, states, state_shapes()) for name, damage in cases}
  assert set(found.values()) == {'step 2, exact', 'step 3, exact'}, found


def test_the_newest_intact_one_is_taken_and_the_others_are_named_and_set_aside(run, capfd):
  spoil(run / 'checkpoints' / '3')
  (run / 'checkpoints' / '2' / 'commit_success.txt').unlink()
  with opened(run) as checkpoints:
    assert states_equal(checkpoints.restore(state_shapes())[0], make_state(1))
    checkpoints.save(make_state(2), 2)
  said = capfd.readouterr().err
  assert '3 is damaged: params/head/kernel: the digest differs' in said
  assert '2 is damaged: it has no commit_success.txt' in said
  assert f'3 is moved to {run / "checkpoints" / "damaged" / "3"}' in said
  assert names(run) == {'2', 'damaged'}  # One is kept, and what is damaged is nobody's to delete.
  assert {path.name for path in (run / 'checkpoints' / 'damaged').iterdir()} == {'2', '3'}


def test_where_none_is_intact_nothing_starts_again_from_scratch(run):
  for step in '123':
    spoil(run / 'checkpoints' / step)
  for _ in range(2):  # However often it is tried.
    with (
      opened(run) as checkpoints,
      pytest.raises(UserError, match='none of the checkpoints .* is intact.*for you to decide'),
    ):
      checkpoints.restore(state_shapes())
  assert names(run) == {'1', '2', '3'}
  (run / 'checkpoints' / 'damaged').mkdir()
  for step in '123':
    shutil.rmtree(run / 'checkpoints' / step)
  with opened(run) as checkpoints, pytest.raises(UserError, match='none of the checkpoints'):
    checkpoints.restore(state_shapes())


def test_parameters_are_not_read_from_a_damaged_checkpoint(run):
  assert load_newest_params(run)[1] == 3
  spoil(run / 'checkpoints' / '3')
  with pytest.raises(
    UserError, match='3 is damaged: params/head/kernel: the digest differs.*vit_jax verify'
  ):
    load_newest_params(run)
  assert names(run) == {'1', '2', '3'}


def test_what_interrupted_saves_and_deletions_left_is_removed_and_nothing_else(run):
  place = run / 'checkpoints'
  shutil.copytree(place / '1', place / '4.orbax-checkpoint-tmp')
  shutil.copytree(place / '1', place / '0.deleted')
  (place / 'mine').mkdir()
  with opened(run):
    assert names(run) == {'1', '2', '3', 'mine'}


def test_an_older_step_is_refused_and_the_newest_is_saved_already(run):
  with opened(run, keep=3) as checkpoints:
    with pytest.raises(ValueError, match='step 2 is to be saved, and 3 is saved'):
      checkpoints.save(make_state(2), 2)
    checkpoints.save(make_state(7), 3)
    checkpoints.finish(make_state(7), 3)
  with opened(run) as checkpoints:
    assert states_equal(checkpoints.restore(state_shapes())[0], make_state(3))


def test_deleting_goes_on_rightly_after_a_restart(tmp_path):
  for first in (0, 4, 8):
    with opened(tmp_path, keep=2, keep_every=3) as checkpoints:
      for step in range(first + 1, first + 5):
        checkpoints.save(make_state(step), step)
  assert names(tmp_path) == {'3', '6', '9', '11', '12'}


def test_a_state_is_saved_as_it_was_though_its_memory_is_given_away(tmp_path):
  update = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1 if x.ndim else x, state), donate_argnums=0
  )
  state, expected = make_state(1, 4), {}
  with opened(tmp_path, keep=9) as checkpoints:
    for step in range(1, 5):
      expected[step] = jax.tree.map(np.array, jax.device_get(state))
      checkpoints.save(state, step)
      state = update(update(state))
  for step, state in expected.items():
    got = io.read_checkpoint_as_numpy(tmp_path / 'checkpoints' / str(step))
    assert got['params']['head']['kernel'].tobytes() == state.params['head']['kernel'].tobytes()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
  state = make_state(1)
  with opened(tmp_path, keep=9) as checkpoints:
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
      match='2 could not be saved: the state is not finite: 9 elements, first in opt_state/0/mom',
    ):
      checkpoints.finish(state, 3)
  assert list_saved_steps(tmp_path / 'checkpoints') == [1]


def test_a_full_disk_is_told_at_once_harms_nothing_and_once_freed_is_no_matter(small, capfd):
  with opened(small, keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(make_state(step, 4), step)
    checkpoints.save(make_state(3, 4), 3)
    time.sleep(1)
    ballast = small / 'ballast'
    with contextlib.suppress(OSError):
      ballast.write_bytes(bytes(24 * 2**20))
    for step in (4, 5):
      checkpoints.save(make_state(step, 4), step)
      assert f'{step} could not be saved: ' in told(checkpoints, capfd)
    assert sorted(list_saved_steps(small / 'checkpoints')) == [2, 3]
    ballast.unlink()
    for step in (6, 7):
      checkpoints.save(make_state(step, 4), step)
  assert names(small) == {'6', '7'}
  with opened(small) as checkpoints:
    assert states_equal(checkpoints.restore(state_shapes(4))[0], make_state(7, 4))


def test_a_disk_that_can_not_be_written_for_long_ends_the_run_with_an_error_of_its_own(small):
  with opened(small) as checkpoints:
    checkpoints.save(make_state(1), 1)
    checkpoints.close()
  with opened(small) as checkpoints, read_only(small):
    with pytest.raises(
      StorageError, match='3 checkpoints in a row could not be saved; the last was .*Read-only'
    ):
      for step in range(2, 9):
        checkpoints.save(make_state(step), step)
    assert step == 5
  with opened(small) as checkpoints:
    assert states_equal(checkpoints.restore(state_shapes())[0], make_state(1))


@pytest.mark.parametrize('failures', [1, 3, 4])
def test_the_last_save_is_tried_four_times(tmp_path, monkeypatch, failures):
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
  with pytest.raises(StorageError, match='1 could not be saved: Input/output error'):
    checkpoints.finish(make_state(1), 1)
  assert names(tmp_path) == set()


def test_storage_that_does_not_answer_is_an_error_and_no_hang(tmp_path, monkeypatch):
  ended = threading.Event()
  original = io.format_manifest
  monkeypatch.setattr(io, 'format_manifest', lambda *args: ended.wait(30) and original(*args))
  monkeypatch.setattr(manager, 'SAVE_TIMEOUT', 0.5)
  with opened(tmp_path) as checkpoints:
    checkpoints.save(make_state(1), 1)
    with pytest.raises(StorageError, match='1 is still not written after'):
      checkpoints.save(make_state(2), 2)
    ended.set()
    monkeypatch.setattr(manager, 'SAVE_TIMEOUT', 30)


def test_storage_that_fails_to_read_is_told_from_damage(run, monkeypatch):
  """Orbax's own errors do not tell: whether the files can be read at all does."""

  def fail(*args, **kwargs):
    raise ValueError('UNAVAILABLE: error reading file')

  monkeypatch.setattr(files, 'RETRY_DELAYS', (0.01,) * 3)
  monkeypatch.setattr(io.ocp.PyTreeCheckpointHandler, 'restore', fail)
  with pytest.raises(CorruptCheckpointError, match='it can not be read: UNAVAILABLE'):
    io.read_checkpoint_as_numpy(run / 'checkpoints' / '3')

  def unreadable(path):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(Path, 'read_bytes', unreadable)
  with (
    opened(run) as checkpoints,
    pytest.raises(StorageError, match='reading .*: Input/output error, 4 times'),
  ):
    checkpoints.restore(state_shapes())
  assert names(run) == {'1', '2', '3'}


@pytest.mark.parametrize('jump', [3600, -3600])
def test_clocks_that_jump_change_nothing(tmp_path, monkeypatch, jump):
  clock, began = time.time, time.time()
  monkeypatch.setattr(time, 'time', lambda: clock() + (jump if clock() > began + 0.3 else 0))
  monkeypatch.setattr(time, 'time_ns', lambda: int(time.time() * 1e9))
  for first in (1, 4):
    with opened(tmp_path, keep=2) as checkpoints:
      restored = checkpoints.restore(state_shapes())
      assert restored is None or states_equal(restored[0], make_state(3))
      for step in range(first, first + 3):
        checkpoints.save(make_state(step), step)
        time.sleep(0.1)
  assert names(tmp_path) == {'5', '6'}


def test_trainers_that_are_killed_lose_nothing(tmp_path):
  """Six of the rounds of soak/test_kills.py."""
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(jax.config.jax_compilation_cache_dir),
  }
  command = [sys.executable, 'tests/soak/saver.py', str(tmp_path), '6', '0', '1']
  found = json.loads(
    subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
  )
  assert (found['lost'], found['wrong']) == (0, 0)
  assert found['saved'] > 0 and len(found['verified']) >= 2
