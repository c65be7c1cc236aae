"""A failed read of a checkpoint leaves no tasks behind that report to a closed event loop."""

import asyncio
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.checkpoint.event_loop import draining_event_loops
from vit_jax.checkpoint.io import (
  CheckpointWriter,
  CorruptCheckpointError,
  read_checkpoint_as_numpy,
)
from vit_jax.step import TrainState


def test_a_loop_waits_for_its_tasks_before_it_is_closed():
  finished, failed, reports = threading.Event(), threading.Event(), []

  async def wait_for_a_thread():
    future = asyncio.get_running_loop().create_future()

    def report():
      failed.wait()
      try:
        future.get_loop().call_soon_threadsafe(future.set_result, 'read')
        reports.append('reported')
      except RuntimeError as error:
        reports.append(error)
      finished.set()

    threading.Thread(target=report).start()
    return await future

  async def fail():
    await asyncio.sleep(0)
    raise ValueError('damaged')

  async def read_both():
    await asyncio.gather(wait_for_a_thread(), fail())

  with draining_event_loops():
    loop = asyncio.new_event_loop()
    with pytest.raises(ValueError, match='damaged'):
      loop.run_until_complete(read_both())
    failed.set()
    loop.close()
  assert finished.wait(60)
  assert reports == ['reported']
  assert loop.is_closed()


def test_loops_that_are_created_later_are_the_usual_ones():
  policy = asyncio.get_event_loop_policy()
  with draining_event_loops():
    assert asyncio.get_event_loop_policy() is not policy
  assert asyncio.get_event_loop_policy() is policy


def test_a_damaged_checkpoint_is_one_error_and_no_output(tmp_path, capfd):
  params = {f'x{i}': jnp.arange(2048.0) + i for i in range(40)}
  state = TrainState(step=jnp.int32(1), params=params, opt_state=(), ema=None)
  writer = CheckpointWriter()
  writer.save(tmp_path / '1', state, 1, {})
  writer.wait()
  writer.close()
  np.testing.assert_array_equal(
    read_checkpoint_as_numpy(tmp_path / '1', 'params')['params']['x3'], np.arange(2048) + 3
  )
  for file in (tmp_path / '1' / 'state').rglob('d/*'):
    file.write_bytes(file.read_bytes()[:100])
  capfd.readouterr()
  for _ in range(3):
    with pytest.raises(CorruptCheckpointError):
      read_checkpoint_as_numpy(tmp_path / '1', 'params')
  assert capfd.readouterr().err == ''
