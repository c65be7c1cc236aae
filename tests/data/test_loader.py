"""Batches do not depend on hosts, workers, threads or the first step."""

import itertools
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import cv2
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from vit_jax.config import DataConfig
from vit_jax.data.decode import BadImageError
from vit_jax.data.images import write_train_image
from vit_jax.data.loader import diagnose_bad_example, eval_batches, max_bad_examples, train_batches
from vit_jax.data.sampler import shuffled_example
from vit_jax.errors import UserError

ROOT = Path(__file__).parents[2]


class Photos:
  """JPEG files of random pixels with one or two labels; the files in `bad` are truncated."""

  max_labels = 2

  def __init__(self, examples: int, bad: tuple[int, ...] = ()):
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (20 + i % 7, 24, 3), dtype=np.uint8) for i in range(examples)]
    self.files = [cv2.imencode('.jpg', image)[1].tobytes() for image in pixels]
    for i in bad:
      self.files[i] = self.files[i][:200]

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int):
    return self.files[i], (i, i + 1) if i % 3 == 0 else (i,), f'{i}.jpg'


class Numbers:
  """Images whose pixels are their index, with a record of the examples read."""

  max_labels = 1

  def __init__(self, examples: int):
    self.examples, self.read = examples, []

  def __len__(self) -> int:
    return self.examples

  def __getitem__(self, i: int):
    self.read.append(i)
    return np.full((4, 4), i % 256, np.uint8), (i,), f'number {i}'


def config(**kwargs) -> DataConfig:
  return DataConfig(**{'batch': 8, 'size': (16, 12), 'threads': 2} | kwargs)


def train(
  source, count: int, c: DataConfig | None = None, *, seed=0, start=0, host=0, hosts=1
) -> list[dict]:
  batches = train_batches(source, c or config(), seed=seed, start=start, host=host, hosts=hosts)
  out = list(itertools.islice(batches, count))
  batches.close()
  return out


def evaluate(source, c: DataConfig | None = None, *, host=0, hosts=1, **kwargs) -> list[dict]:
  return list(eval_batches(source, c or config(), host=host, hosts=hosts, **kwargs))


def assert_equal(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name in batch:
      assert batch[name].dtype == other[name].dtype
      assert np.array_equal(batch[name], other[name])


def concatenate_hosts(hosts: list[list[dict]]) -> list[dict]:
  """Concatenate the batches of several hosts."""
  join = lambda batches: {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
  return [join(batches) for batches in zip(*hosts, strict=True)]


PHOTOS = Photos(27)


@pytest.mark.parametrize('workers', [1, 2, 4])
def test_worker_processes_change_nothing(workers):
  assert_equal(train(PHOTOS, 9, config(workers=workers, threads=0)), train(PHOTOS, 9))


def test_worker_processes_change_nothing_in_evaluation():
  c = config(eval_batch=4)
  assert_equal(
    evaluate(PHOTOS, config(eval_batch=4, workers=2), exact=True), evaluate(PHOTOS, c, exact=True)
  )


@pytest.mark.parametrize('threads', [1, 3, 16])
def test_threads_change_nothing(threads):
  assert_equal(
    train(PHOTOS, 5, config(batch=40, threads=threads)), train(PHOTOS, 5, config(batch=40))
  )


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_have_contiguous_slices_of_the_same_batches(hosts):
  assert_equal(
    concatenate_hosts([train(PHOTOS, 7, host=h, hosts=hosts) for h in range(hosts)]),
    train(PHOTOS, 7),
  )
  assert_equal(
    concatenate_hosts([evaluate(PHOTOS, host=h, hosts=hosts) for h in range(hosts)]),
    evaluate(PHOTOS),
  )


@pytest.mark.parametrize('start', [1, 3, 11])
def test_the_first_step_changes_nothing(start):
  assert_equal(train(PHOTOS, 3, start=start), train(PHOTOS, start + 3)[start:])


def test_a_late_first_step_reads_no_earlier_examples():
  source = Numbers(60_000)
  (batch,) = train(source, 1, config(batch=4), start=10**9)
  assert len(source.read) <= 4 * 4  # Including prefetched batches.
  assert batch['label'][:, 0].tolist() == [
    shuffled_example(4 * 10**9 + i, 60_000, 0)[1] for i in range(4)
  ]


@pytest.mark.parametrize(('examples', 'batch'), [(24, 8), (27, 8), (5, 8), (1, 4)])
def test_an_epoch_has_each_example_once_and_batches_may_span_two_epochs(examples, batch):
  batches = train(Numbers(examples), -(-3 * examples // batch), config(batch=batch))
  labels = np.concatenate([b['label'][:, 0] for b in batches])[: 3 * examples]
  assert all(b['mask'].all() for b in batches)
  for epoch in range(3):
    assert sorted(labels[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
  examples=st.integers(1, 40),
  hosts=st.integers(1, 8),
  local_batch=st.integers(1, 5),
  seed=st.integers(0, 2**31 - 1),
)
def test_several_hosts_have_the_examples_of_one_host_in_its_order(
  examples, hosts, local_batch, seed
):
  steps = -(-2 * examples // (hosts * local_batch))
  c = config(batch=hosts * local_batch, size=(2, 2), crop='resize')
  batches = concatenate_hosts(
    [train(Numbers(examples), steps, c, seed=seed, host=h, hosts=hosts) for h in range(hosts)]
  )
  ids = np.concatenate([batch['id'] for batch in batches])
  assert ids.tolist() == [
    shuffled_example(position, examples, seed)[1] for position in range(len(ids))
  ]
  assert sorted(ids[:examples]) == sorted(ids[examples : 2 * examples]) == list(range(examples))
  assert_equal(batches, train(Numbers(examples), steps, c, seed=seed))


def test_ids_are_indices_and_mark_unreadable_examples():
  batches = evaluate(Photos(11, bad=(0, 9)), config(bad_images='skip'))
  assert np.concatenate([batch['id'] for batch in batches]).tolist() == [
    ~0,
    *range(1, 9),
    ~9,
    10,
    *[-1] * 5,
  ]
  assert (
    np.concatenate([batch['mask'] for batch in batches]) == [0, *[1] * 8, 0, 1, *[0] * 5]
  ).all()


def test_a_training_image_is_drawn_from_the_seed_the_epoch_and_its_index():
  source, c = Photos(5), config(batch=4)
  for seed in (0, 7):
    for k, batch in enumerate(train(source, 4, c, seed=seed)):
      for row, index in enumerate(batch['id'].tolist()):
        data, _, name = source[index]
        expected = np.empty((16, 12, 3), np.uint8)
        write_train_image(
          data,
          expected,
          name=name,
          key=(seed, (4 * k + row) // 5, index),
          crop='inception',
          area=c.crop_area,
          aspect=c.crop_aspect,
          side=0,
          flip=True,
          decoding={'max_pixels': c.max_pixels},
        )
        np.testing.assert_array_equal(batch['image'][row], expected)


def test_copies_of_an_example_differ_and_do_not_depend_on_hosts_or_start():
  options = {'three_augment': True, 'color_jitter': 0.3, 'random_erasing': 0.5}
  options |= {'randaug_ops': 2, 'randaug_magnitude': 9.0, 'randaug_variant': 'timm'}
  source = Photos(9)
  c = config(batch=8, repeats=2, train_interpolation='pil_random', **options)
  batches = train(source, 4, c)
  for batch in batches:
    first, second = batch['id'][:4], batch['id'][4:]
    np.testing.assert_array_equal(first, second)
    for i in range(4):
      assert not np.array_equal(batch['image'][i], batch['image'][4 + i])
  assert_equal(batches[2:], train(source, 2, c, start=2))
  parts = [train(source, 4, c, host=host, hosts=4) for host in range(4)]
  joined = [
    {name: np.concatenate([part[name] for part in each]) for name in each[0]}
    for each in zip(*parts, strict=True)
  ]
  assert_equal(batches, joined)


def test_the_same_example_differs_in_the_next_epoch():
  one, two = train(Photos(1), 2, config(batch=1))
  assert not np.array_equal(one['image'], two['image'])


@pytest.mark.parametrize('hosts', [1, 2, 4])
@pytest.mark.parametrize('examples', [1, 8, 16, 21])
def test_evaluation_has_each_example_once_over_all_hosts(examples, hosts):
  parts = [evaluate(Numbers(examples), host=h, hosts=hosts) for h in range(hosts)]
  assert {len(part) for part in parts} == {-(-examples // 8)}
  batches = concatenate_hosts(parts)
  assert all(b['image'].shape == (8, 16, 12, 3) for b in batches)
  mask, labels = (np.concatenate([b[name] for b in batches]) for name in ('mask', 'label'))
  assert labels[mask][:, 0].tolist() == list(range(examples))
  assert (labels[~mask] == -1).all()
  assert not any(b['image'][~b['mask']].any() for b in batches)


def test_labels_are_padded_with_minus_one():
  (batch,) = evaluate(Photos(3))
  assert batch['label'].dtype == np.int32
  assert batch['label'][:4].tolist() == [[0, 1], [1, -1], [2, -1], [-1, -1]]


def test_exact_images_are_float32():
  exact, rounded = evaluate(PHOTOS, exact=True), evaluate(PHOTOS)
  assert exact[0]['image'].dtype == np.float32
  assert np.abs(exact[0]['image'] - rounded[0]['image']).max() <= 1


@pytest.mark.parametrize('workers', [0, 2])
def test_a_skipped_image_is_masked(workers):
  source, bad = Photos(27, bad=(3, 4, 19)), {3, 4, 19}
  c = config(bad_images='skip', batch=9, workers=workers)
  batches = train(source, 6, c)
  assert sum((~b['mask']).sum() for b in batches) == 2 * len(bad)
  assert_equal(batches, train(source, 6, config(bad_images='skip', batch=9)))
  batches = evaluate(source, config(bad_images='skip', batch=9))
  seen = np.concatenate([b['label'][:, 0] for b in batches])
  assert set(np.flatnonzero(seen == -1)) == bad
  for b in batches:
    assert not b['image'][~b['mask']].any()
    assert (b['label'][~b['mask']] == -1).all()
    assert (b['label'][b['mask'], 0] >= 0).all()


def test_the_allowed_number_of_bad_images_is_rounded_up():
  skip = config(bad_images='skip', max_bad_fraction=0.01)
  assert [max_bad_examples(skip, n) for n in (0, 1, 100, 101)] == [0, 1, 1, 2]
  assert max_bad_examples(config(max_bad_fraction=0.01), 1000) == 0


def test_a_bad_image_is_diagnosed_by_reading_it_again():
  source = Photos(4, bad=(2,))
  assert diagnose_bad_example(source, 2, 10**6) == ('2.jpg', 'the file is truncated')
  assert diagnose_bad_example(source, 1, 10**6)[0] == '1.jpg'


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_image_is_the_same_error_in_a_worker(workers):
  with pytest.raises(BadImageError, match=r'^5\.jpg: .*bad_images=skip$') as error:
    evaluate(Photos(12, bad=(5,)), config(workers=workers))
  assert type(error.value) is BadImageError


def test_a_batch_must_be_divisible_by_the_hosts():
  with pytest.raises(UserError, match=r'config\.data\.batch=8 .* 3 hosts; use 6 or 9'):
    train_batches(PHOTOS, config(), seed=0, start=0, host=0, hosts=3)
  with pytest.raises(UserError, match=r'config\.data\.eval_batch=10 .* 4 hosts; use 8 or 12'):
    eval_batches(PHOTOS, config(eval_batch=10), host=0, hosts=4)


def test_memory_is_reused_but_not_while_it_is_referenced():
  batches = train_batches(
    Numbers(64), config(batch=16, crop='resize', flip=False), seed=0, start=0, host=0, hosts=1
  )
  views = [
    next(batches)['image'][3:5, 1:, ::2] for _ in range(12)
  ]  # Only views keep the memory alive.
  again = train(Numbers(64), 12, config(batch=16, crop='resize', flip=False))
  assert all(
    np.array_equal(view, batch['image'][3:5, 1:, ::2])
    for view, batch in zip(views, again, strict=True)
  )
  addresses = Counter(next(batches)['image'].ctypes.data for _ in range(20))
  assert len(addresses) < 10


def test_a_program_with_workers_exits_cleanly(tmp_path):
  """A script that worker processes import again; it exits in the middle of an epoch."""
  script = f"""
    import sys
    sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
    from test_loader import Photos, config, train_batches

    def main():
      batches = train_batches(Photos(9), config(workers=2), seed=0, start=0, host=0, hosts=1)
      print(sum(next(batches)['mask'].sum() for _ in range(3)))
      raise SystemExit(3)

    if __name__ == '__main__':
      main()
  """
  path = tmp_path / 'script.py'
  path.write_text(textwrap.dedent(script), encoding='utf-8')
  before = set(Path('/dev/shm').glob('psm_*'))
  done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
  assert (done.stdout, done.stderr) == ('24\n', '')
  assert done.returncode == 3
  assert set(Path('/dev/shm').glob('psm_*')) <= before
