"""What a run says: whole records, once each, also after an interruption."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from vit_jax.errors import UserError
from vit_jax.metrics.writer import MetricsWriter, Stopwatch, plot_curves, read_metrics

TRAIN = {'loss': 1.0, 'lr': 0.1, 'images_per_second': 1234.5, 'seconds_per_step': 0.5}


def test_going_on_takes_out_the_records_that_are_made_again(tmp_path):
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  for step in (2, 4, 6):
    metrics.record(step, TRAIN)
  metrics.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 7, "lo')  # Cut short by a crash.
  again = MetricsWriter(tmp_path, step=4, steps=9)
  again.record(6, TRAIN)
  again.close()
  assert [record['step'] for record in read_metrics(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize(
  'line',
  ['{"step": 2, "loss"', '[]', '{}', '3', '{"step": "2"}', '{"step": 1.5}', '\0\0', '\ufffd'],
)
def test_a_line_that_is_no_record_is_an_error_that_names_it(tmp_path, line):
  (tmp_path / 'metrics.jsonl').write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
  with pytest.raises(UserError, match=r'metrics.jsonl, line 2 is no record of a step'):
    MetricsWriter(tmp_path, step=3, steps=9)


def test_tensorboard_gets_every_value(tmp_path):
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  metrics.record(3, TRAIN)
  metrics.close()
  (file,) = (tmp_path / 'tensorboard').iterdir()
  values = {
    value.tag: value.simple_value
    for event in events(file)
    for value in event.summary.value
    if event.step == 3
  }
  assert values == pytest.approx(TRAIN)


def events(file):
  """TensorBoard's records: a length, its checksum, an Event, its checksum."""
  data = file.read_bytes()
  while data:
    length = int.from_bytes(data[:8], 'little')
    yield event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]


def test_a_line_without_a_terminal_says_all(tmp_path, capsys):
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  metrics.progress(5, TRAIN | {'mfu': 0.42})
  metrics.close()
  assert (
    capsys.readouterr().err
    == 'step 5/9  loss 1.0000  lr 1.00e-01  img/s 1,234  mfu 42.0%  left 00:02\n'
  )


def test_a_loss_that_is_no_number_is_still_json(tmp_path):
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  metrics.record(1, TRAIN | {'loss': float('nan')})
  metrics.close()
  assert json.loads((tmp_path / 'metrics.jsonl').read_text())['loss'] == 'nan'


def test_other_hosts_write_nothing(tmp_path, capsys):
  metrics = MetricsWriter(tmp_path, step=0, steps=9, write=False)
  metrics.record(1, TRAIN)
  metrics.say('nothing')
  metrics.close()
  assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ''


def test_pauses_are_not_counted():
  work = jax.block_until_ready(jnp.zeros(3))
  watch = Stopwatch()
  with watch.paused(work):
    time.sleep(0.5)
  assert watch.lap() < 0.5


def test_curves_are_a_picture(tmp_path):
  metrics = MetricsWriter(tmp_path, step=0, steps=9)
  metrics.record(1, TRAIN)
  metrics.record(1, {'test_accuracy': 0.5, 'test_loss': 1.1})
  metrics.close()
  assert plot_curves(tmp_path).read_bytes().startswith(b'\x89PNG')
