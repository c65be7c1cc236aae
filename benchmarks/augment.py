"""Compare the augmentation of an image with Pillow, in CPU time.

    python benchmarks/augment.py FOLDER

Photos are resized to 224 x 224 first. Both sides start from an array and end with one. They take
turns, so that other load on the machine affects both, and the smallest time of a photo counts.
The affine transforms are Pillow's on both sides. The last rows are whole recipes, beside the time
to decode, crop and resize a photo.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vit_jax.data import pillow_ops as ops  # noqa: E402
from vit_jax.data.augment import Augmentation  # noqa: E402
from vit_jax.data.images import write_train_image  # noqa: E402

SIZE = (224, 224)
GRAY = (128, 128, 128)
SHEAR = (1, 0.2, 0, 0, 1, 0)
AFFINE = Image.Transform.AFFINE

# Operation -> (ours, Pillow's).
PAIRS: dict[str, tuple[Callable, Callable]] = {
  'grayscale': (ops.grayscale, lambda x: x.convert('L').convert('RGB')),
  'solarize': (lambda x: ops.solarize(x, 128), ImageOps.solarize),
  'posterize': (lambda x: ops.posterize(x, 3), lambda x: ImageOps.posterize(x, 3)),
  'invert': (ops.invert, ImageOps.invert),
  'autocontrast': (ops.autocontrast, ImageOps.autocontrast),
  'equalize': (ops.equalize, ImageOps.equalize),
  'brightness': (
    lambda x: ops.brightness(x, 1.3), lambda x: ImageEnhance.Brightness(x).enhance(1.3)
  ),
  'contrast': (lambda x: ops.contrast(x, 1.3), lambda x: ImageEnhance.Contrast(x).enhance(1.3)),
  'saturation': (lambda x: ops.saturation(x, 1.3), lambda x: ImageEnhance.Color(x).enhance(1.3)),
  'sharpness': (lambda x: ops.sharpness(x, 1.3), lambda x: ImageEnhance.Sharpness(x).enhance(1.3)),
  'Gaussian blur': (
    lambda x: ops.gaussian_blur(x, 1.2), lambda x: x.filter(ImageFilter.GaussianBlur(1.2))
  ),
  'rotate, bicubic': (
    lambda x: ops.rotate(x, 20, 'pil_bicubic', GRAY),
    lambda x: x.rotate(20, Image.Resampling.BICUBIC, fillcolor=GRAY),
  ),
  'shear, bilinear': (
    lambda x: ops.warp_affine(x, SHEAR, 'pil_bilinear', GRAY),
    lambda x: x.transform(x.size, AFFINE, SHEAR, Image.Resampling.BILINEAR, fillcolor=GRAY),
  ),
}  # fmt: skip
RANDAUGMENT = {'randaug_ops': 2, 'randaug_magnitude': 9.0, 'interpolation': 'pil_bicubic'}
RECIPES = {
  '3-Augment and color jitter 0.3 (DeiT III)': {'three_augment': True, 'color_jitter': 0.3},
  'random erasing 0.25': {'random_erasing': 0.25},
  **{
    f'2 operations of RandAugment, {variant}': RANDAUGMENT | {'randaug_variant': variant}
    for variant in ('intended', 'noisystudent', 'big_vision', 'timm')
  },
}
CROP = {
  'name': '', 'crop': 'inception', 'area': (0.08, 1.0), 'aspect': (3 / 4, 4 / 3), 'side': 0,
  'flip': True, 'interpolation': 'pil_bicubic', 'decoding': {'max_pixels': 10**8},
}  # fmt: skip


def milliseconds(functions: list[Callable], rounds: int) -> list[float]:
  """Return the smallest CPU time of each function. They take turns."""
  best = [float('inf')] * len(functions)
  for _ in range(rounds):
    for i, function in enumerate(functions):
      start = time.thread_time()
      function()
      best[i] = min(best[i], 1000 * (time.thread_time() - start))
  return best


def pillow_side(function: Callable, image: np.ndarray) -> np.ndarray:
  return np.asarray(function(Image.fromarray(image)))


def print_row(name: str, times: list[list[float]]):
  cells = [f'{each:.2f}' for each in np.mean(times, axis=0)]
  print(f'| {name} | {cells[0]} | {cells[1] if cells[1:] else ""} |', flush=True)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path, help='searched for *.jpg, at any depth')
  parser.add_argument('--photos', type=int, default=20)
  parser.add_argument('--rounds', type=int, default=10)
  args = parser.parse_args()
  cv2.setNumThreads(1)
  paths = sorted(args.folder.rglob('*.jpg'))
  files = [path.read_bytes() for path in paths[:: max(1, len(paths) // args.photos)]][: args.photos]
  images = [np.asarray(Image.open(p).convert('RGB').resize(SIZE)) for p in paths[: args.photos]]
  print('| operation | ms an image | Pillow |\n|---|---|---|')
  for name, (ours, theirs) in PAIRS.items():
    sides = lambda x, o=ours, t=theirs: [partial(o, x), partial(pillow_side, t, x)]
    print_row(name, [milliseconds(sides(image), args.rounds) for image in images])
  out = np.empty((*SIZE, 3), np.uint8)
  decode = lambda i: write_train_image(files[i], out, key=(0, 0, i), **CROP)
  times = [milliseconds([partial(decode, i)], args.rounds) for i in range(len(files))]
  print_row('decode, crop, resize (bicubic)', times)
  for name, settings in RECIPES.items():
    apply = Augmentation(**settings)
    # Keys differ, so that every operation occurs.
    draws = [(image, (0, e, i)) for i, image in enumerate(images) for e in range(args.rounds)]
    print_row(name, [milliseconds([partial(apply, *draw)], 3) for draw in draws])


if __name__ == '__main__':
  main()
