"""Kinds of damage to a checkpoint in storage, as functions of its directory.

    python tests/soak/damage.py WORKDIR MIB

applies each kind of damage to a copy of a checkpoint of MIB MiB in WORKDIR, and prints
{outcome of restoring: names of the cases} as JSON. test_damage.py runs it as a process, because
Orbax leaves coroutines that are reported only after the test.
"""

import collections
import gc
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.soak.saver import make_state, state_shapes, states_equal
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.step import TrainState

Damage = Callable[[Path], object]
IGNORE_UNAWAITED_FUTURES = 'ignore::pytest.PytestUnraisableExceptionWarning'


def flip_bit(file: Path, bit: int):
  content = bytearray(file.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  file.write_bytes(content)


def zero_range(file: Path, start: int, size: int):
  content = bytearray(file.read_bytes())
  content[start : start + size] = bytes(len(content[start : start + size]))
  file.write_bytes(content)


def swap_contents(file: Path, other: Path):
  content = file.read_bytes()
  file.write_bytes(other.read_bytes())
  other.write_bytes(content)


def replace_with_symlink(path: Path):
  """Move a file or folder, and leave a symbolic link to it."""
  elsewhere = path.with_name(f'{path.name}.elsewhere')
  path.rename(elsewhere)
  path.symlink_to(elsewhere)


def replace_with_fifo(file: Path):
  """Replace a file with a named pipe that has no writer."""
  file.unlink()
  os.mkfifo(file)


def delete_half_the_files(directory: Path, rng: random.Random):
  """Delete half of the files, like an interrupted deletion."""
  files = sorted(path for path in directory.rglob('*') if path.is_file())
  for file in rng.sample(files, len(files) // 2):
    file.unlink()


def replace_with_unrelated_directory(directory: Path):
  """Replace a directory with one that has an unrelated file."""
  shutil.rmtree(directory)
  directory.mkdir()
  (directory / 'notes.txt').write_text('mine', encoding='utf-8')


def replace_with_file(directory: Path):
  shutil.rmtree(directory)
  directory.write_text('no directory', encoding='utf-8')


def replace_with_previous_step(directory: Path):
  """Replace a checkpoint with a copy of the one before: intact, but of another step."""
  shutil.rmtree(directory)
  shutil.copytree(directory.with_name(str(int(directory.name) - 1)), directory)


def file_damages(file: Path, rng: random.Random, flips: int) -> Iterator[tuple[str, Damage]]:
  """Yield (name, function) for each kind of damage to one file."""
  size = file.stat().st_size
  starts, noise = [rng.randrange(max(size - 64, 1)) for _ in range(2)], rng.randbytes(size)
  yield 'deleted', lambda path: path.unlink()
  yield 'emptied', lambda path: path.write_bytes(b'')
  for share in (0.25, 0.5, 0.75):
    yield f'cut at {share}', lambda path, at=int(share * size): os.truncate(path, at)
  yield 'a byte short', lambda path: os.truncate(path, max(size - 1, 0))
  yield 'a byte long', lambda path: path.write_bytes(path.read_bytes() + b'\0')
  yield 'other bytes', lambda path: path.write_bytes(noise)
  yield 'zeros', lambda path: path.write_bytes(bytes(size))
  for start in starts:
    yield f'hole at {start}', lambda path, start=start: zero_range(path, start, 64)
  yield 'a link', replace_with_symlink
  yield 'a pipe', replace_with_fifo
  for bit in rng.sample(range(8 * size), min(flips, 8 * size)):
    yield f'bit {bit} flipped', lambda path, bit=bit: flip_bit(path, bit)


def checkpoint_damages(
  checkpoint: Path, rng: random.Random, *, flips: int
) -> Iterator[tuple[str, Damage]]:
  """Yield (name, function) for each kind of damage to each file, each folder and the checkpoint.

  The functions take a copy of the checkpoint.
  """
  files = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob('*') if path.is_file())
  for file in files:
    for name, damage in file_damages(checkpoint / file, rng, flips):
      yield f'{file}: {name}', lambda path, file=file, damage=damage: damage(path / file)
    yield (
      f'{file}: of the step before',
      lambda path, file=file: replace_with_previous_file(path, file),
    )
  for a, b in [rng.sample(files, 2) for _ in range(len(files))]:
    yield f'{a}: swapped with {b}', lambda path, a=a, b=b: swap_contents(path / a, path / b)
  for folder in sorted(
    path.relative_to(checkpoint) for path in checkpoint.rglob('*') if path.is_dir()
  ):
    yield f'{folder}: deleted', lambda path, folder=folder: shutil.rmtree(path / folder)
    yield f'{folder}: a link', lambda path, folder=folder: replace_with_symlink(path / folder)
  yield from {
    'foreign': replace_with_unrelated_directory,
    'a file': replace_with_file,
    'a link': replace_with_symlink,
    'of another step': replace_with_previous_step,
  }.items()
  for seed in range(10):
    yield (
      f'half deleted, {seed}',
      lambda path, seed=seed: delete_half_the_files(path, random.Random(seed)),
    )


def replace_with_previous_file(path: Path, file: Path):
  """Replace a file with the same file of the checkpoint before.

  Data files have random names. The largest file replaces a file whose name does not exist there.
  """
  before = path.with_name(str(int(path.name) - 1))
  same = (
    before / file
    if (before / file).is_file()
    else max(before.rglob('*'), key=lambda each: each.stat().st_size)
  )
  shutil.copyfile(same, path / file)


def save_three_checkpoints(workdir: Path, mib: float):
  """Save the checkpoints 1, 2 and 3."""
  workdir.mkdir()
  checkpoints = CheckpointManager(workdir, max_to_keep=3)
  for step in (1, 2, 3):
    checkpoints.save(make_state(step, mib), step)
  checkpoints.close()


def restore_outcome(
  intact: Path, damage: Damage, states: dict[int, TrainState], shapes: TrainState
) -> str:
  """Return the state that a run restores after damage to its newest checkpoint, 3.

  The expected text is 'step 2, exact' or 'step 3, exact'. Another text reports an error, a wrong
  state, or files that are missing or left behind.
  """
  copy = intact.with_name('copy')
  shutil.rmtree(copy, ignore_errors=True)
  shutil.copytree(intact, copy)
  damage(copy / 'checkpoints' / '3')
  checkpoints = CheckpointManager(copy)
  try:
    restored = checkpoints.restore(shapes)
  except Exception as error:
    return f'{type(error).__name__}: {error}'[:200]
  finally:
    checkpoints.close()
    # Report the coroutines that Orbax did not await after a failed read here, not in a later test.
    gc.collect()
  if restored is None:
    return 'from scratch'
  state, _ = restored
  step = int(state.step)
  place = copy / 'checkpoints'
  names = sorted(path.name for path in place.iterdir() if not path.name.endswith('.elsewhere'))
  if names != ['1', '2', *(['damaged'] if os.path.lexists(place / 'damaged' / '3') else ['3'])]:
    return f'step {step}, and the files are {names}'
  return f'step {step}, ' + ('exact' if states_equal(state, states[step]) else 'WRONG')


def main(workdir: Path, mib: float):
  """Apply each kind of damage to each file, and flip 20 bits of each file."""
  found = collections.defaultdict(list)
  save_three_checkpoints(workdir / 'intact', mib)
  states, shapes = {step: make_state(step, mib) for step in (1, 2, 3)}, state_shapes(mib)
  for name, damage in checkpoint_damages(
    workdir / 'intact' / 'checkpoints' / '3', random.Random(0), flips=20
  ):
    found[restore_outcome(workdir / 'intact', damage, states, shapes)].append(name)
  print(json.dumps(found))


if __name__ == '__main__':
  main(Path(sys.argv[1]), float(sys.argv[2]))
