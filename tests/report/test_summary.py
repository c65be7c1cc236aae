"""The sentences of a report name what a run had."""

import pytest

from vit_jax.config import Config
from vit_jax.report.summary import describe_regularization
from vit_jax.settings.fields import with_settings

ON = {
  'RandAugment timm with 2 operations at magnitude 9': {
    'data.randaug_ops': 2, 'data.randaug_magnitude': 9.0, 'data.randaug_variant': 'timm',
  },
  '3-Augment': {'data.three_augment': True},
  'color jitter 0.3': {'data.color_jitter': 0.3},
  'random erasing 0.25': {'data.random_erasing': 0.25},
  '3 copies of each image': {'data.repeats': 3},
  'mixup 0.8': {'mixup': 0.8},
  'CutMix 1': {'cutmix': 1.0},
  'SAM 0.6': {'optim.sam_rho': 0.6},
}  # fmt: skip


@pytest.mark.parametrize(('name', 'settings'), ON.items())
def test_what_is_on_is_named_alone(name, settings):
  assert describe_regularization(with_settings(Config(), settings)) == f', with {name}'


def test_all_that_is_on_is_named_and_nothing_by_default():
  everything = {key: value for settings in ON.values() for key, value in settings.items()}
  assert describe_regularization(with_settings(Config(), everything)) == f', with {", ".join(ON)}'
  gsam = {'optim.sam_rho': 0.6, 'optim.gsam_alpha': 0.4}
  assert describe_regularization(with_settings(Config(), gsam)) == ', with GSAM 0.6 with alpha 0.4'
  assert describe_regularization(Config()) == ''
