"""The operations of the augmentation, each with the reference that it is compared with.

Write the measured figures, and print the table of docs/guides/augmentation.md:

    python -m pytest -m parity -s tests/data/test_augment_parity.py \\
      | python -m tests.data.augment_certificates
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from tests.data.big_vision_reference import REFERENCE, cutout
from vit_jax.data import augment, pillow_ops
from vit_jax.data.big_vision_randaugment import BIG_VISION_OPS
from vit_jax.data.images import simple_random_crop
from vit_jax.data.sampler import random_bits
from vit_jax.data.timm_randaugment import TIMM_OPS, Draw, apply_operation

FIGURES = Path(__file__).with_name('augment_figures.json')
FILL = (124, 116, 104)
MEAN, SCALE = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class Certificate:
  """An operation. `compare(image, t, i)` returns our image and that of the reference.

  `t` goes from 0 to 1 over the photos, and `i` counts them: they give magnitude and direction.
  """

  name: str
  setting: str
  reference: str
  compare: Callable[[np.ndarray, float, int], tuple[np.ndarray, np.ndarray]]


def pil(function: Callable) -> Callable:
  return lambda image, *args: np.asarray(function(Image.fromarray(image), *args))


def timm_op(name: str) -> Callable:
  def compare(image, t, i):
    module = importlib.import_module('timm.data.auto_augment')
    level, sign = 9.999 * t / 10, -1 if i % 2 else 1
    interpolation = ('pil_bilinear', 'pil_bicubic')[i // 2 % 2]
    draw = Draw(name, True, level, sign, interpolation)
    params = {'img_mean': FILL, 'interpolation': pillow_ops.FILTERS[interpolation]}
    op = module.AugmentOp(name, prob=1.0, magnitude=level * 10, hparams=params)
    with mock.patch.object(module, '_randomly_negate', lambda value: sign * value):
      return apply_operation(image, draw, FILL), np.asarray(op(Image.fromarray(image)))

  return compare


def big_vision_op(name: str) -> Callable:
  def compare(image, t, i):
    level, sign = int(30 * t) / 10, -1 if i % 2 else 1
    bits = (1 << 63) * (sign > 0) + (17 * i % 2**16 << 16) + (29 * i % 2**16 << 32)
    ours = BIG_VISION_OPS[name](image, level, bits)
    if name == 'Cutout':
      y, x = ((bits >> at & 0xFFFF) * n >> 16 for at, n in zip((16, 32), image.shape, strict=False))
      return ours, cutout(image, level, y, x)
    return ours, REFERENCE[name](image, level, sign)

  return compare


def jitter(image, t, i):
  functional = importlib.import_module('torchvision.transforms.functional')
  bits = random_bits((i, 0, 0), 0)
  order, factors = augment.draw_jitter(bits, t)
  names = ('adjust_brightness', 'adjust_contrast', 'adjust_saturation')
  theirs = Image.fromarray(image)
  for each in order:
    theirs = getattr(functional, names[each])(theirs, factors[each])
  return augment.jitter_colors(image, bits, t), np.asarray(theirs)


def enhanced(ours: Callable, enhancer) -> Callable:
  def compare(image, t, i):
    return ours(image, 2 * t), pil(lambda x: enhancer(x).enhance(2 * t))(image)

  return compare


def erase(image, t, i):
  """Give timm's transform our draws. It works on normalized floats; noise is clipped as ours."""
  torch = importlib.import_module('torch')
  module = importlib.import_module('timm.data.random_erasing')
  key = (i, 0, 0)
  y, x, h, w = augment.draw_erased_box(image.shape[:2], key)
  noise = augment.normal_noise(random_bits(key, augment.ERASING_BLOCK)[1], (h, w, 3))
  mean, scale = (torch.tensor(v)[:, None, None] for v in (MEAN, SCALE))
  pixels = (torch.tensor(image).permute(2, 0, 1).float() - mean) / scale
  area, aspect = (h + 1e-9) * w / (image.shape[0] * image.shape[1]), np.log(h / w)
  with (
    mock.patch.object(module.random, 'uniform', mock.Mock(side_effect=[area, aspect])),
    mock.patch.object(module.random, 'randint', mock.Mock(side_effect=[y, x])),
    mock.patch.object(module, '_get_pixels', lambda *a, **k: torch.tensor(noise).permute(2, 0, 1)),
  ):
    transform = module.RandomErasing(1.0, mode='pixel', max_count=1, device='cpu')
    theirs = transform(pixels) * scale + mean
  theirs = theirs.permute(1, 2, 0).numpy().clip(0, 255)
  return augment.erase_box(image, key, mean=MEAN, scale=SCALE), theirs


def simple_crop(image, t, i):
  """Give torchvision's transforms, as DeiT III composes them, the position that we draw."""
  transforms = importlib.import_module('torchvision.transforms')
  size, key = 96 + int(128 * t), (i, 0, 0)
  ours = simple_random_crop(image, (size, size), 'pil_bicubic', key=key)
  crop = transforms.RandomCrop(size, padding=4, padding_mode='reflect')
  resized = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)(
    Image.fromarray(image)
  )
  bits = random_bits(key, 0)
  y, x = (bits[j] * (resized.size[1 - j] + 8 - size + 1) >> 64 for j in range(2))
  with mock.patch.object(crop, 'get_params', lambda *args: (y, x, size, size)):
    return ours, np.asarray(crop(resized))


def blur(image, t, i):
  _, radius = augment.draw_three_augment(random_bits((i, 0, 0), 0))
  theirs = pil(lambda x: x.filter(ImageFilter.GaussianBlur(radius)))
  return pillow_ops.gaussian_blur(image, radius), theirs(image)


def solarize(image, t, i):
  return pillow_ops.solarize(image, 128), pil(ImageOps.solarize)(image)


def grayscale(image, t, i):
  transforms = importlib.import_module('torchvision.transforms')
  return pillow_ops.grayscale(image), pil(transforms.Grayscale(3))(image)


THREE, JITTER = '`data.three_augment`', '`data.color_jitter`'
PILLOW = 'Pillow'
# fmt: off
CERTIFICATES = [
  Certificate('3-Augment, grayscale', THREE, 'torchvision `Grayscale(3)`', grayscale),
  Certificate('3-Augment, solarize', THREE, PILLOW, solarize),
  Certificate('3-Augment, Gaussian blur', THREE, PILLOW, blur),
  Certificate('color jitter, brightness', JITTER, PILLOW,
              enhanced(pillow_ops.brightness, ImageEnhance.Brightness)),
  Certificate('color jitter, contrast', JITTER, PILLOW,
              enhanced(pillow_ops.contrast, ImageEnhance.Contrast)),
  Certificate('color jitter, saturation', JITTER, PILLOW,
              enhanced(pillow_ops.saturation, ImageEnhance.Color)),
  Certificate('color jitter, all three in random order', JITTER, 'torchvision', jitter),
  Certificate('random erasing', '`data.random_erasing`', 'timm `RandomErasing`, clipped', erase),
  Certificate('simple random crop', '`data.crop=simple`', 'torchvision, as DeiT III composes it',
              simple_crop),
  *(Certificate(f'timm, {name}', '`data.randaug_variant=timm`', 'timm `AugmentOp`', timm_op(name))
    for name in TIMM_OPS),
  *(Certificate(f'big_vision, {name}', '`data.randaug_variant=big_vision`',
                'its formulas in NumPy', big_vision_op(name)) for name in BIG_VISION_OPS),
]
# fmt: on


def read_figures(output: str) -> dict[str, str]:
  """Return {operation: difference} of the lines that test_augment_parity.py prints."""
  names = {each.name for each in CERTIFICATES}
  rows = (line.lstrip('.').rpartition(': ') for line in output.splitlines())
  return {name: difference for name, _, difference in rows if name in names}


def markdown(figures: dict[str, str]) -> str:
  """Return the table of docs/guides/augmentation.md."""
  rows = [
    '| operation | setting | compared with | largest difference (of 255) |',
    '|---|---|---|---|',
  ]
  rows += [
    f'| {each.name} | {each.setting} | {each.reference} | {figures[each.name]} |'
    for each in CERTIFICATES
  ]
  return '\n'.join(rows)


if __name__ == '__main__':
  recorded = json.loads(FIGURES.read_text(encoding='utf-8')) if FIGURES.exists() else {}
  recorded |= read_figures(sys.stdin.read())
  recorded = {each.name: recorded[each.name] for each in CERTIFICATES}
  text = json.dumps(recorded, indent=2, ensure_ascii=False)
  FIGURES.write_text(text + '\n', encoding='utf-8')
  print(markdown(recorded))
