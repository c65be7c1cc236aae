"""Run directories with odd names work, and a run ends only when its checkpoint was read back."""

import contextlib
import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from tests.soak.damage import IGNORE_UNAWAITED_FUTURES, flip_bit
from tests.soak.saver import make_state, state_shapes, states_equal
from vit_jax.checkpoint import io, manager
from vit_jax.checkpoint.io import CorruptCheckpointError, read_back
from vit_jax.checkpoint.manager import CheckpointManager, list_saved_steps, load_newest_params
from vit_jax.errors import StorageError

pytestmark = pytest.mark.filterwarnings(IGNORE_UNAWAITED_FUTURES)

ODD_NAMES = (
  '[2026] runs', '[', ']', '*', '?', '*[', '{a,b}', '!', '~', '~root', '$HOME', '100%', '%2F', '#1',
  'file:', 'gs:', 's3:', 'a;b', 'a,b', 'a=b', 'a&b', "it's", '"', 'back\\slash', ' a ', 'a\tb',
  'a\nb', '-a', '--workdir', '...', '@', '+', '|', '<>', '`', '\x01', '\u2028',
  unicodedata.normalize('NFC', 'é'), unicodedata.normalize('NFD', 'é'), 'é' * 125, 'x' * 250,
  os.fsdecode(b'\xff\xfe'), 'ocdbt.process_0', '1.orbax-checkpoint-tmp',
)  # fmt: skip


def save_and_restore(workdir: Path) -> bool:
  """Save step 1 in a directory, and return True if every reader gets its bits."""
  checkpoints = CheckpointManager(workdir)
  checkpoints.finish(make_state(1), 1)
  checkpoints = CheckpointManager(workdir)
  state, _ = checkpoints.restore(state_shapes())
  checkpoints.close()
  kernel = load_newest_params(workdir)[0]['head']['kernel']
  expected = make_state(1)
  return states_equal(state, expected) and kernel.tobytes() == (
    expected.params['head']['kernel'].tobytes()
  )


@pytest.mark.parametrize('name', ODD_NAMES, ids=ascii)
def test_a_run_directory_may_have_any_name(tmp_path, name):
  assert save_and_restore(tmp_path / name / 'run')
  assert {path.name for path in tmp_path.iterdir()} == {name}


@pytest.mark.parametrize('workdir', ['[x]/run', 's3:x', '-run', 'link/run'])
def test_a_run_directory_may_be_relative_and_symlinked(tmp_path, monkeypatch, workdir):
  monkeypatch.chdir(tmp_path)
  (tmp_path / '[real]').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / '[real]')
  assert save_and_restore(Path(workdir))


@contextlib.contextmanager
def damaged_after_writing(monkeypatch, damage, steps=(2,)):
  """Apply `damage` to the checkpoints of `steps`, right after each was written."""
  save, wait = io.CheckpointWriter.save, io.CheckpointWriter.wait

  def save_and_note(self, path, *args):
    self.written = path
    save(self, path, *args)

  def wait_and_damage(self):
    wait(self)
    if int(self.written.name) in steps:
      damage(self.written)

  with monkeypatch.context() as patch:
    patch.setattr(io.CheckpointWriter, 'save', save_and_note)
    patch.setattr(io.CheckpointWriter, 'wait', wait_and_damage)
    yield


def flip_array_bit(checkpoint: Path):
  files = (path for path in checkpoint.rglob('*') if path.is_file())
  flip_bit(max(files, key=lambda path: path.stat().st_size), 8 * 5000 + 3)


def remove_array_index(checkpoint: Path):
  (checkpoint / 'state' / 'manifest.ocdbt').unlink()


@pytest.mark.parametrize('damage', [flip_array_bit, remove_array_index])
def test_a_run_does_not_end_well_with_an_unreadable_checkpoint(
  tmp_path, monkeypatch, capfd, damage
):
  monkeypatch.setattr(manager, 'RETRY_DELAYS', (0.01,))
  checkpoints = CheckpointManager(tmp_path)
  checkpoints.save(make_state(1), 1)
  with (
    damaged_after_writing(monkeypatch, damage),
    pytest.raises(StorageError, match='checkpoints/2 ') as error,
  ):
    checkpoints.finish(make_state(2), 2)
  assert error.value.exit_code == 74 and '\n' not in str(error.value)
  assert list_saved_steps(tmp_path / 'checkpoints') == [1]  # The older checkpoint was not deleted.
  assert 'damaged/2' in capfd.readouterr().err
  checkpoints = CheckpointManager(tmp_path)
  assert states_equal(checkpoints.restore(state_shapes())[0], make_state(1))
  checkpoints.close()


def test_an_unreadable_checkpoint_does_not_replace_an_older_one(tmp_path, monkeypatch, capfd):
  with damaged_after_writing(monkeypatch, remove_array_index):
    checkpoints = CheckpointManager(tmp_path, max_to_keep=1)
    checkpoints.save(make_state(1), 1)
    checkpoints.save(make_state(2), 2)
    checkpoints.save(make_state(3), 3)
    assert list_saved_steps(tmp_path / 'checkpoints') == [1]
    checkpoints.close()
  assert '2 could not be saved: ' in capfd.readouterr().err
  assert list_saved_steps(tmp_path / 'checkpoints') == [3]


def test_a_last_checkpoint_that_cannot_be_read_back_is_written_again(tmp_path, monkeypatch):
  monkeypatch.setattr(manager, 'RETRY_DELAYS', (0.01,) * 3)
  left = [1]

  def damage_once(path):
    left[0] -= 1
    if left[0] >= 0:
      flip_array_bit(path)

  checkpoints = CheckpointManager(tmp_path)
  with damaged_after_writing(monkeypatch, damage_once):
    checkpoints.finish(make_state(2), 2)
  checkpoints = CheckpointManager(tmp_path)
  assert states_equal(checkpoints.restore(state_shapes())[0], make_state(2))
  checkpoints.close()


def test_reading_back_reads_arrays_up_to_the_limit_and_all_metadata(tmp_path, monkeypatch):
  checkpoints = CheckpointManager(tmp_path)
  checkpoints.finish(make_state(1), 1)
  checkpoint, read, check = tmp_path / 'checkpoints' / '1', [], io.check_checksums
  monkeypatch.setattr(io, 'check_checksums', lambda *args: (read.extend(args[0]), check(*args)))
  # 2 · 128 · 102 · 4 bytes of `kernel`, 66 of `bias`, 252 of `momentum`, two scalars of 4.
  small = {'params/head/bias', 'opt_state/0/momentum', 'opt_state/2', 'step'}
  for limit, expected in ((10**9, small | {'params/head/kernel'}), (66 + 252 + 8, small)):
    read.clear()
    read_back(checkpoint, limit)
    assert set(read) == expected
  flip_array_bit(checkpoint)
  with pytest.raises(CorruptCheckpointError, match='params/head/kernel'):
    read_back(checkpoint)
  shutil.rmtree(checkpoint / 'state' / 'd', ignore_errors=True)
  remove_array_index(checkpoint)
  with pytest.raises(CorruptCheckpointError):
    read_back(checkpoint, 0)
