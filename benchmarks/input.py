"""Compare the training input path with tf.data on the same files, in images per CPU second.

    python benchmarks/input.py FOLDER --tensorflow=PYTHON

Both sides read JPEG files, decode, take the inception crop at 224 px, flip and batch to uint8.
tf.data uses its fast path: `decode_and_crop_jpeg`, AUTOTUNE and prefetching. Each measurement is a
separate process, and the sides alternate (ours, theirs, theirs, ours, …), so that other load on the
machine affects both.

Start-up is counted in the same way on both sides. A *whole process* is measured from its first
instruction to its exit, with imports and the start of worker processes. *After imports* excludes
the imports and the exit of the process itself, but no worker process.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from itertools import cycle, islice, product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = {'ours': 'vit_jax', 'theirs': 'tf.data'}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path, help='searched for *.jpg and *.jpeg, at any depth')
  parser.add_argument(
    '--tensorflow', default=sys.executable, help='the Python that has TensorFlow, if not this one'
  )
  parser.add_argument('--images', type=int, default=15_000)
  parser.add_argument('--batch', type=int, default=250)
  parser.add_argument('--rounds', type=int, default=4, help='measurements of each side')
  parser.add_argument(
    '--workers', type=int, default=0, help='our worker processes; 0 means threads'
  )
  parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.side:
    print(json.dumps(SIDES[args.side](args)))
    return
  measured = {side: [] for side in SIDES}
  for round_ in range(args.rounds):
    for side in ('ours', 'theirs') if round_ % 2 == 0 else ('theirs', 'ours'):
      measured[side].append(measure(side, args))
      print(f'{ROWS[side]:>8}: {measured[side][-1]}', file=sys.stderr)
  print(table(measured, args))


def measure(side: str, args) -> dict[str, float]:
  """Run one side in a separate process; return images per second of CPU and of wall time."""
  python = args.tensorflow if side == 'theirs' else sys.executable
  command = [python, __file__, f'--side={side}', str(args.folder)]
  command += [f'--images={args.images}', f'--batch={args.batch}', f'--workers={args.workers}']
  before, start = cpu_seconds(resource.RUSAGE_CHILDREN), time.perf_counter()
  done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
  wall, cpu = time.perf_counter() - start, cpu_seconds(resource.RUSAGE_CHILDREN) - before
  if done.returncode:
    sys.exit(done.stderr)
  own = json.loads(done.stdout.splitlines()[-1])
  seconds = {'whole_cpu': cpu, 'whole_wall': wall, 'cpu': own['cpu'], 'wall': own['wall']}
  return {name: round(own['images'] / value, 1) for name, value in seconds.items()}


def ours(args) -> dict[str, float]:
  sys.path.insert(0, str(ROOT))
  from vit_jax.config import DataConfig
  from vit_jax.data.loader import train_batches

  config = DataConfig(batch=args.batch, workers=args.workers)
  batches = lambda: train_batches(Files(paths(args)), config, seed=0, start=0, host=0, hosts=1)
  return drain(batches, args)


def theirs(args) -> dict[str, float]:
  import tensorflow as tf

  def example(path):
    data = tf.io.read_file(path)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.io.extract_jpeg_shape(data),
      tf.zeros([0, 0, 4]),
      area_range=(0.05, 1.0),
      aspect_ratio_range=(3 / 4, 4 / 3),
      min_object_covered=0,
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
    image = tf.image.random_flip_left_right(tf.image.resize(image, (224, 224)))
    return {'image': tf.cast(image, tf.uint8)}

  def batches():
    data = tf.data.Dataset.from_tensor_slices(paths(args)).map(example, tf.data.AUTOTUNE)
    yield from data.batch(args.batch).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()

  return drain(batches, args)


class Files:
  """A source of the loader: the JPEG files of a folder."""

  max_labels = 1

  def __init__(self, files: list[str]):
    self.files = files

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> tuple[bytes, tuple[int, ...], str]:
    with open(self.files[i], 'rb') as file:  # noqa: PTH123 -- half the time of Path.read_bytes.
      return file.read(), (0,), self.files[i]


def paths(args) -> list[str]:
  """Return `images` paths, repeating the files as needed."""
  files = sorted(
    str(path) for path in args.folder.rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg')
  )
  return list(islice(cycle(files), args.images))


def drain(batches, args) -> dict[str, float]:
  """Consume all images, and end the worker processes.

  The CPU time of a worker is added to its parent when the parent has waited for it.
  """
  both = lambda: cpu_seconds(resource.RUSAGE_SELF) + cpu_seconds(resource.RUSAGE_CHILDREN)
  cpu, wall, images = both(), time.perf_counter(), 0
  iterator = batches()
  for batch in islice(iterator, -(-args.images // args.batch)):
    images += len(batch['image'])
  wall = time.perf_counter() - wall
  iterator.close()
  return {'images': images, 'cpu': both() - cpu, 'wall': wall}


def cpu_seconds(who: int) -> float:
  usage = resource.getrusage(who)
  return usage.ru_utime + usage.ru_stime


def table(measured: dict[str, list[dict[str, float]]], args) -> str:
  """Print medians and bests. The best measurement is the least affected by other load."""
  columns = {
    'whole_cpu': 'img/CPU-s, whole process',
    'whole_wall': 'img/s, whole process',
    'cpu': 'img/CPU-s, after imports',
    'wall': 'img/s, after imports',
  }
  ways = f'{args.workers} worker processes' if args.workers else 'threads'
  cores = len(os.sched_getaffinity(0))
  lines = [
    f'{args.images} images, {cores} cores, ours with {ways}, {args.rounds} measurements each',
    '',
  ]
  lines.append(f'| {"":32} | {ROWS["ours"]:>8} | {ROWS["theirs"]:>8} | ratio |')
  lines.append(f'|{"-" * 34}|{"-" * 10}|{"-" * 10}|{"-" * 7}|')
  for (name, title), (of, pick) in product(
    columns.items(), (('median', statistics.median), ('best', max))
  ):
    a, b = (pick([m[name] for m in measured[side]]) for side in ('ours', 'theirs'))
    lines.append(f'| {title + ", " + of:32} | {a:8.0f} | {b:8.0f} | {a / b:5.2f} |')
  return '\n'.join(lines)


SIDES = {'ours': ours, 'theirs': theirs}
ENVIRONMENT = {'TF_CPP_MIN_LOG_LEVEL': '3', 'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}

if __name__ == '__main__':
  main()
