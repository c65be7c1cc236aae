"""Augmentation of a training image after it has been cropped, flipped and resized, on the host.

In this order: RandAugment, 3-Augment, color jitter, random erasing. Each is off by default.

All randomness comes from the key of an image: (seed, epoch, example). Each operation reads its own
blocks of the stream (`sampler.random_bits`), so that switching one on does not change the others.
Crop and flip read the blocks below 100.
"""

import dataclasses
import itertools
import math

import numpy as np

from vit_jax.config import DataConfig, ModelConfig
from vit_jax.data import pillow_ops as pillow
from vit_jax.data.big_vision_randaugment import BIG_VISION_OPS
from vit_jax.data.pillow_ops import ImageArray
from vit_jax.data.randaugment import RANDAUGMENT_VARIANTS, rand_augment
from vit_jax.data.sampler import RandomKey, random_bits
from vit_jax.data.timm_randaugment import apply_operation, draw_operation, unit

# config.data.randaug_variant -> operations. 'timm' has its own module.
RANDAUGMENT_TABLES = RANDAUGMENT_VARIANTS | {'big_vision': BIG_VISION_OPS}

RANDAUGMENT_BLOCK = 100
TIMM_BLOCK = 101  # And one more for each further operation of timm's RandAugment, at most 7.
INTERPOLATION_BLOCK = 110
THREE_AUGMENT_BLOCK = 111
JITTER_BLOCK = 112
ERASING_BLOCK = 113
BOX_BLOCK = 114  # And one more for each further attempt to draw a box.

BLUR_RADIUS = (0.1, 2.0)  # Of 3-Augment.
SOLARIZE_THRESHOLD = 128
# Of timm's random erasing: fractions of the image, height / width, and attempts to draw a box.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10

# The operations of color jitter, and the orders in which they may be applied.
JITTER_OPS = (pillow.brightness, pillow.contrast, pillow.saturation)
JITTER_ORDERS = tuple(itertools.permutations(range(3)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
  """The settings of these operations. They have the names of `DataConfig` and `ModelConfig`.

  `interpolation` is that of the training images. `mean` and `scale` are of uint8 pixels.
  """

  randaug_ops: int = 0
  randaug_magnitude: float = 0.0
  randaug_variant: str = 'intended'
  three_augment: bool = False
  color_jitter: float = 0.0
  random_erasing: float = 0.0
  interpolation: str = 'tf_bilinear'
  mean: tuple[float, ...] = (127.5,)
  scale: tuple[float, ...] = (127.5,)

  def __call__(self, image: ImageArray, key: RandomKey) -> ImageArray:
    """Return the augmented image, uint8 [h, w, 3]. `image` is not changed."""
    if self.randaug_ops and self.randaug_variant == 'timm':
      image = self._rand_augment_timm(image, key)
    elif self.randaug_ops:
      image = rand_augment(
        image,
        random_bits(key, RANDAUGMENT_BLOCK),
        count=self.randaug_ops,
        magnitude=self.randaug_magnitude,
        operations=RANDAUGMENT_TABLES[self.randaug_variant],
      )
    if self.three_augment:
      image = three_augment(image, random_bits(key, THREE_AUGMENT_BLOCK))
    if self.color_jitter:
      image = jitter_colors(image, random_bits(key, JITTER_BLOCK), self.color_jitter)
    if unit(random_bits(key, ERASING_BLOCK)[0]) < self.random_erasing:
      image = erase_box(image, key, mean=self.mean, scale=self.scale)
    return image

  def _rand_augment_timm(self, image: ImageArray, key: RandomKey) -> ImageArray:
    fill = tuple(min(255, round(value)) for value in self.mean * (3 // len(self.mean)))
    for i in range(self.randaug_ops):
      draw = draw_operation(
        random_bits(key, TIMM_BLOCK + i),
        magnitude=self.randaug_magnitude,
        interpolation=self.interpolation,
      )
      image = apply_operation(image, draw, fill)
    return image


def make_augmentation(data: DataConfig, model: ModelConfig) -> Augmentation | None:
  """Return the augmentation of a run, or None if all of it is off."""
  if not (data.randaug_ops or data.three_augment or data.color_jitter or data.random_erasing):
    return None
  return Augmentation(
    randaug_ops=data.randaug_ops,
    randaug_magnitude=data.randaug_magnitude,
    randaug_variant=data.randaug_variant,
    three_augment=data.three_augment,
    color_jitter=data.color_jitter,
    random_erasing=data.random_erasing,
    interpolation=train_interpolation(data),
    mean=model.mean,
    scale=model.scale,
  )


def train_interpolation(data: DataConfig) -> str:
  """Return the interpolation of training images. big_vision trains models of 'tf_area' so."""
  name = data.train_interpolation or data.interpolation
  return 'tf_bilinear' if name == 'tf_area' else name


def three_augment(image: ImageArray, bits: tuple[int, ...]) -> ImageArray:
  """Apply one of grayscale, solarize and Gaussian blur: the 3-Augment of DeiT III (2204.07118)."""
  name, radius = draw_three_augment(bits)
  return {
    'grayscale': lambda: pillow.grayscale(image),
    'solarize': lambda: pillow.solarize(image, SOLARIZE_THRESHOLD),
    'blur': lambda: pillow.gaussian_blur(image, radius),
  }[name]()


def draw_three_augment(bits: tuple[int, ...]) -> tuple[str, float]:
  """Return the name of the operation and the radius of the blur."""
  return ('grayscale', 'solarize', 'blur')[bits[0] % 3], uniform(bits[1], *BLUR_RADIUS)


def jitter_colors(image: ImageArray, bits: tuple[int, ...], strength: float) -> ImageArray:
  """Change brightness, contrast and saturation by random factors, in a random order."""
  order, factors = draw_jitter(bits, strength)
  for i in order:
    image = JITTER_OPS[i](image, factors[i])
  return image


def draw_jitter(bits: tuple[int, ...], strength: float) -> tuple[tuple[int, ...], list[float]]:
  """Return the order of the operations and a factor from 1 - strength to 1 + strength for each."""
  order = JITTER_ORDERS[bits[0] % len(JITTER_ORDERS)]
  return order, [uniform(each, 1 - strength, 1 + strength) for each in bits[1:4]]


def erase_box(
  image: ImageArray, key: RandomKey, *, mean: tuple[float, ...], scale: tuple[float, ...]
) -> ImageArray:
  """Fill a box with noise: `mean` + `scale` times a normal number for each value.

  timm adds the noise to normalized floats. Here it is rounded and clipped to the range of uint8.
  """
  y, x, h, w = draw_erased_box(image.shape[:2], key)
  noise = normal_noise(random_bits(key, ERASING_BLOCK)[1], (h, w, len(mean)))
  image = image.copy()
  image[y : y + h, x : x + w] = np.clip(np.rint(noise * scale + mean), 0, 255)
  return image


def draw_erased_box(size: tuple[int, int], key: RandomKey) -> tuple[int, int, int, int]:
  """Return (y, x, h, w) of a box inside an image of `size`. It is empty if no attempt fits."""
  height, width = size
  for attempt in range(ERASING_ATTEMPTS):
    bits = random_bits(key, BOX_BLOCK + attempt)
    area = uniform(bits[0], *ERASED_AREA) * height * width
    aspect = math.exp(uniform(bits[1], *map(math.log, ERASED_ASPECT)))
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if h < height and w < width:
      return (height - h + 1) * bits[2] >> 64, (width - w + 1) * bits[3] >> 64, h, w
  return 0, 0, 0, 0


def normal_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  """Return normal numbers, float32.

  They are computed here from random integers, because those of NumPy's generators may change with
  its version.
  """
  pairs = (math.prod(shape) + 1) // 2
  raw = np.random.Philox(key=seed).random_raw(pairs)
  radius = np.sqrt(-2 * np.log(((raw >> 32) + 0.5) * 2**-32))
  angle = (raw & 0xFFFFFFFF) * (2 * np.pi * 2**-32)
  both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
  return both[: math.prod(shape)].reshape(shape).astype(np.float32)


def uniform(bits: int, low: float, high: float) -> float:
  """Return a number in [low, high) from a uniform 64-bit integer."""
  return low + unit(bits) * (high - low)
