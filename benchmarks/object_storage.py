"""Compare packed records with loose files behind a server with a latency and a bandwidth.

    python benchmarks/object_storage.py FOLDER [--latency=0.03] [--bandwidth=125e6]

Both sides make training batches with the default number of threads, from the same images in the
same order. Loose files are those of `folder:`; each is one request, as if its mount had all names
and sizes in memory, which favours it. `records:` are read by URL. No image is read twice. The sides
alternate, so that other load on the machine affects both.
"""

import argparse
import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec

from vit_jax.config import DataConfig
from vit_jax.data import folder
from vit_jax.data.loader import train_batches
from vit_jax.data.pack import PackOptions, pack_source
from vit_jax.data.sources import open_source

SERVER = Path(__file__).resolve().parents[1] / 'tests' / 'data' / 'range_server.py'


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path, help='with class folders, or with train/CLASS')
  parser.add_argument('--latency', type=float, default=0.03, help='seconds of a request')
  parser.add_argument('--bandwidth', type=float, default=125e6, help='bytes a second')
  parser.add_argument('--size', type=int, default=32, help='pixels')
  parser.add_argument('--batch', type=int, default=256)
  parser.add_argument('--batches', type=int, default=8, help='of records; of files a quarter')
  parser.add_argument('--rounds', type=int, default=2)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as packed:
    pack_source(f'folder:{args.folder}', Path(packed), PackOptions(splits=('train',)))
    sides = {
      'loose files': lambda: measure_files(args),
      'records': lambda: measure_records(Path(packed), args),
    }
    found = {name: [] for name in sides}
    for _, name in itertools.product(range(args.rounds), sides):
      found[name].append(sides[name]())
      print(f'{name}: {found[name][-1]:,.0f} images/s', flush=True)
  files, records = (statistics.median(found[name]) for name in sides)
  print(f'medians: {files:,.0f} and {records:,.0f} images/s, ratio {records / files:.1f}')


@contextlib.contextmanager
def serve(root: Path, args) -> Iterator[str]:
  """Serve a folder in another process. Yield the URL."""
  command = [sys.executable, SERVER, root, f'--latency={args.latency}']
  process = subprocess.Popen(
    [*command, f'--bandwidth={args.bandwidth}'], stdout=subprocess.PIPE, text=True
  )
  try:
    yield f'http://127.0.0.1:{int(process.stdout.readline())}'
  finally:
    process.kill()
    process.communicate()


def measure_files(args) -> float:
  """Return images a second of `folder:` whose files are fetched from the server."""
  with serve(args.folder, args) as url:
    system, read = fsspec.filesystem('http'), folder.read_image_file
    folder.read_image_file = lambda path: system.cat_file(f'{url}/{path.relative_to(args.folder)}')
    try:
      return measure(open_source(f'folder:{args.folder}', 'train'), args.batches // 4, args)
    finally:
      folder.read_image_file = read


def measure_records(packed: Path, args) -> float:
  """Return images a second of `records:URL`. The time has the reading of the footers."""
  with serve(packed, args) as url:
    return measure(open_source(f'records:{url}', 'train'), args.batches, args)


def measure(source, batches: int, args) -> float:
  """Return images a second of the first batches."""
  if batches * args.batch > len(source):
    sys.exit(f'{len(source):,} images are fewer than {batches} batches')
  data = DataConfig(batch=args.batch, size=(args.size, args.size))
  begin = time.perf_counter()
  stream = train_batches(source, data, seed=0, start=0, host=0, hosts=1)
  for _ in range(batches):
    next(stream)
  seconds = time.perf_counter() - begin
  stream.close()
  return batches * args.batch / seconds


if __name__ == '__main__':
  main()
