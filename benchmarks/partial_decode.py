"""Compare decoding only the rows of the crop with decoding the full JPEG, in CPU time.

    python benchmarks/partial_decode.py FOLDER

Both sides decode, crop (inception, 224 px), flip and resize each image. They alternate, so that
other load on the machine affects both. The result is the ratio of the CPU times of the sums.
"""

import argparse
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vit_jax.data import decode  # noqa: E402
from vit_jax.data.images import write_train_image  # noqa: E402

SETTINGS = {
  'crop': 'inception',
  'area': (0.05, 1.0),
  'aspect': (3 / 4, 4 / 3),
  'side': 0,
  'flip': True,
  'max_pixels': 10**8,
}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path, help='searched for *.jpg, at any depth')
  parser.add_argument('--rounds', type=int, default=5, help='crops of each image')
  args = parser.parse_args()
  files = [path.read_bytes() for path in sorted(args.folder.rglob('*.jpg'))]
  read_header, out = decode.read_jpeg_header, np.empty((224, 224, 3), np.uint8)
  read_for_all_rows = lambda data: read_header(data)._replace(mcu_rows=0)
  sides = {'rows of the crop': read_header, 'full image': read_for_all_rows}
  seconds = dict.fromkeys(sides, 0.0)
  for epoch in range(args.rounds):
    for i, data in enumerate(files):
      for name, function in list(sides.items())[:: 1 if (i + epoch) % 2 else -1]:
        with mock.patch.object(decode, 'read_jpeg_header', function):
          start = time.process_time()
          write_train_image(data, out, name='', key=(0, epoch, i), **SETTINGS)
          seconds[name] += time.process_time() - start
  for name, total in seconds.items():
    print(f'{name:>16}: {1000 * total / len(files) / args.rounds:.3f} ms an image')
  partial, full = seconds.values()
  print(f'ratio {partial / full:.3f} for {len(files)} files')


if __name__ == '__main__':
  main()
