"""The draws of the augmentation have the distributions of its references (Kolmogorov–Smirnov).

Draws are compared with those of timm and torchvision, or with the distribution that a paper's code
names. All draws here are a function of a key, so a test gives the same p-value each time.
"""

import collections
import importlib
from unittest import mock

import jax
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from vit_jax.data import augment
from vit_jax.data.augment import Augmentation, draw_erased_box, draw_jitter, draw_three_augment
from vit_jax.data.big_vision_randaugment import BIG_VISION_OPS
from vit_jax.data.images import random_crop, sample_resized_crop_box
from vit_jax.data.mixup import sample_box
from vit_jax.data.sampler import random_bits
from vit_jax.data.timm_randaugment import TIMM_OPS, draw_operation

pytestmark = pytest.mark.parity
DRAWS = 3000
LEAST = 1e-3  # The least p-value.


def blocks(block: int) -> list[tuple[int, ...]]:
  return [random_bits((5, 0, i), block) for i in range(DRAWS)]


def assert_same_distribution(ours, theirs):
  assert scipy.stats.ks_2samp(ours, theirs).pvalue > LEAST


def assert_equal_chances(values, chances: int):
  counts = list(collections.Counter(values).values())
  assert len(counts) == chances
  assert scipy.stats.chisquare(counts).pvalue > LEAST


def timm_draws(magnitude: float) -> list[tuple[str, float, float, int]]:
  """Return (operation, magnitude, sign, filter) of the operations that timm applies."""
  module = importlib.import_module('timm.data.auto_augment')
  module.random.seed(0)
  np.random.seed(0)
  chosen, found = [], []

  def negate(value):
    chosen.append(-1 if module.random.random() > 0.5 else 1)
    return value * chosen[-1]

  transform = module.rand_augment_transform(f'rand-m{magnitude}-n1-mstd0.5-inc1', {'x': 0})
  for op in transform.ops:
    level_fn = module._shear_level_to_arg  # Its argument is signed and proportional to magnitude.
    op.level_fn = level_fn
    op.aug_fn = lambda image, argument, name=op.name, **kwargs: found.append(
      (name, abs(argument) / 0.3 * 10, chosen[-1], module._interpolation(dict(kwargs)))
    )
  with mock.patch.object(module, '_randomly_negate', negate):
    for _ in range(DRAWS):
      transform(Image.new('RGB', (4, 4)))
  return found


@pytest.mark.parametrize('magnitude', [0, 5, 9, 10])
def test_the_operations_of_timm_have_its_magnitudes_signs_and_filters(magnitude, timm):
  names, magnitudes, signs, filters = zip(*timm_draws(magnitude), strict=True)
  draws = [
    draw_operation(bits, magnitude=magnitude, interpolation='pil_random')
    for bits in blocks(augment.TIMM_BLOCK)
  ]
  applied = [draw for draw in draws if draw.is_applied]
  assert_same_distribution([10 * draw.level for draw in applied], magnitudes)
  assert scipy.stats.binomtest(len(applied), DRAWS, 0.5).pvalue > LEAST
  assert scipy.stats.binomtest(len(names), DRAWS, 0.5).pvalue > LEAST
  for values in ([draw.name for draw in draws], names):
    assert_equal_chances(values, len(TIMM_OPS))
  for values in ([d.sign for d in draws], [d.interpolation for d in draws], signs, filters):
    assert_equal_chances(values, 2)


def test_the_draws_of_timm_are_independent():
  draws = [
    draw_operation(bits, magnitude=5, interpolation='pil_random')
    for bits in blocks(augment.TIMM_BLOCK)
  ]
  names = list(TIMM_OPS)
  table = [
    (names.index(d.name), d.is_applied, d.level, d.sign, len(d.interpolation)) for d in draws
  ]
  correlations = np.corrcoef(np.array(table, np.float64).T) - np.eye(5)
  assert np.abs(correlations).max() < 4 / np.sqrt(DRAWS)


def test_the_operations_of_big_vision_are_equally_likely_in_both_directions():
  bits = [each[0] for each in blocks(augment.RANDAUGMENT_BLOCK)]
  assert_equal_chances([each % len(BIG_VISION_OPS) for each in bits], 16)
  assert_equal_chances([each >> 63 for each in bits], 2)
  for shift in (16, 32):  # The center of Cutout.
    values = [(each >> shift & 0xFFFF) / 2**16 for each in bits]
    assert scipy.stats.kstest(values, 'uniform').pvalue > LEAST


def test_three_augment_draws_one_of_three_operations_and_a_uniform_radius():
  names, radii = zip(*map(draw_three_augment, blocks(augment.THREE_AUGMENT_BLOCK)), strict=True)
  assert_equal_chances(names, 3)
  assert scipy.stats.kstest(radii, scipy.stats.uniform(0.1, 1.9).cdf).pvalue > LEAST


@pytest.mark.parametrize(
  ('size', 'area'), [((333, 500), (0.08, 1.0)), ((60, 400), (0.08, 1.0)), ((500, 375), (0.9, 1.0))]
)
def test_random_resized_boxes_have_the_distribution_of_torchvisions(size, area, timm):
  torch = importlib.import_module('torch')
  transforms = importlib.import_module('torchvision.transforms')
  torch.manual_seed(0)
  image, aspect = Image.new('L', size[::-1]), (3 / 4, 4 / 3)
  theirs = [transforms.RandomResizedCrop.get_params(image, area, aspect) for _ in range(DRAWS)]
  ours = [
    sample_resized_crop_box(*size, key=(5, 0, i), area=area, aspect=aspect) for i in range(DRAWS)
  ]
  for i in range(4):
    assert_same_distribution([box[i] for box in ours], [box[i] for box in theirs])


@pytest.mark.parametrize(('size', 'aspect'), [((10, 1000), (0.75, 4 / 3)), ((1000, 10), (0.75, 2))])
def test_if_no_box_fits_the_largest_in_the_center_is_that_of_torchvision(size, aspect, timm):
  transforms = importlib.import_module('torchvision.transforms')
  image = Image.new('L', size[::-1])
  theirs = transforms.RandomResizedCrop.get_params(image, (0.9, 1.0), aspect)
  assert sample_resized_crop_box(*size, key=(0, 0, 0), area=(0.9, 1.0), aspect=aspect) == theirs


@pytest.mark.parametrize('strength', [0.3, 1.0])
def test_color_jitter_draws_the_factors_and_orders_of_torchvision(strength, timm):
  torch = importlib.import_module('torch')
  jitter = importlib.import_module('torchvision.transforms').ColorJitter(*[strength] * 3)
  torch.manual_seed(0)
  theirs = [
    jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
    for _ in range(DRAWS)
  ]
  ours = [draw_jitter(bits, strength) for bits in blocks(augment.JITTER_BLOCK)]
  for i in range(3):
    assert_same_distribution([factors[i] for _, factors in ours], [each[1 + i] for each in theirs])
  assert_equal_chances([order for order, _ in ours], 6)
  assert_equal_chances([tuple(i for i in each[0].tolist() if i < 3) for each in theirs], 6)


@pytest.mark.parametrize('size', [(48, 48), (30, 100)])
def test_erased_boxes_have_the_sizes_and_positions_of_timms(size, timm):
  torch = importlib.import_module('torch')
  module = importlib.import_module('timm.data.random_erasing')
  module.random.seed(0)
  erase, theirs = module.RandomErasing(1.0, mode='const', device='cpu'), []
  for _ in range(DRAWS // 2):
    erased = erase(torch.ones(1, *size))[0].numpy() == 0
    rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
    theirs.append((rows[0], columns[0], len(rows), len(columns)) if len(rows) else (0, 0, 0, 0))
  ours = [draw_erased_box(size, (5, 0, i)) for i in range(DRAWS)]
  for i in range(4):
    assert_same_distribution([box[i] for box in ours], [box[i] for box in theirs])


def test_an_erased_box_has_normal_noise_and_occurs_with_the_probability():
  black = np.zeros((64, 64, 3), np.uint8)
  settings = {'mean': (100.0, 120.0, 140.0), 'scale': (10.0, 20.0, 30.0)}
  images = [Augmentation(random_erasing=0.25, **settings)(black, (5, 0, i)) for i in range(DRAWS)]
  erased = [image[image.any(-1)] for image in images if image.any()]
  assert scipy.stats.binomtest(len(erased), DRAWS, 0.25).pvalue > LEAST
  noise = (np.concatenate(erased)[::50] - np.array(settings['mean'])) / settings['scale']
  jitter = np.random.default_rng(0).uniform(-0.5, 0.5, noise.shape) / settings['scale']  # Rounding.
  for channel in (noise + jitter).T:
    assert scipy.stats.kstest(channel, 'norm').pvalue > LEAST
  assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 4 / np.sqrt(len(noise))


def test_the_position_of_a_simple_random_crop_is_that_of_torchvisions(timm):
  torch = importlib.import_module('torch')
  transforms = importlib.import_module('torchvision.transforms')
  torch.manual_seed(0)
  grid = np.stack(np.meshgrid(np.arange(40), np.arange(52), indexing='ij'), axis=-1)
  image = Image.new('L', (52, 40))
  theirs = [transforms.RandomCrop.get_params(image, (32, 32))[:2] for _ in range(DRAWS)]
  ours = [random_crop(grid, (32, 32), key=(5, 0, i))[0, 0] for i in range(DRAWS)]
  for i in range(2):
    assert_same_distribution([each[i] for each in ours], [each[i] for each in theirs])


@pytest.mark.parametrize('alpha', [0.4, 1.0])
def test_boxes_of_cutmix_have_the_distribution_of_timms(alpha, timm):
  module = importlib.import_module('timm.data.mixup')
  np.random.seed(0)
  theirs = []
  for lam in np.random.beta(alpha, alpha, DRAWS):
    (top, bottom, left, right), kept = module.cutmix_bbox_and_lam((1, 48, 64), lam)
    theirs.append((top, bottom, left, right, kept) if kept < 1 else (0, 0, 0, 0, 1))

  def edges(key):
    box, kept = sample_box(key, (48, 64), alpha)
    rows, columns = box.any(axis=1), box.any(axis=0)
    low_high = [(side.argmax(), side.argmax() + side.sum()) for side in (rows, columns)]
    return (*low_high[0], *low_high[1], kept)

  keys = jax.random.split(jax.random.key(0), DRAWS)
  ours = np.array(jax.jit(jax.vmap(edges))(keys))
  for i in range(5):
    assert_same_distribution(ours[i], [each[i] for each in theirs])
