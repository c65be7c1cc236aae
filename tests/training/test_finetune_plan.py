"""The plan of `finetune`: what it makes of models, devices and numbers of images."""

import dataclasses

import numpy as np
import pytest

from vit_jax.config import Config, ModelConfig
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.settings.fields import flatten_config
from vit_jax.settings.limits import CHOICES
from vit_jax.training.finetune_plan import (
  DEVICE_PLANS,
  fit_into_seconds,
  plan_settings,
  plan_size,
)


def pretrained(variant: str = 'S/14', size: tuple[int, int] = (224, 224), **steps):
  return PretrainedModel(
    source='model.npz',
    params={},
    config=ModelConfig(variant=variant),
    classes=0,
    preprocessing=Preprocessing(size=size, **steps),
  )


def plan(model=None, platform: str = 'cpu', images: int = 800, max_labels: int = 1) -> dict:
  return plan_settings(
    model or pretrained(), platform, source='folder:a', images=images, max_labels=max_labels
  )


@pytest.mark.parametrize('platform', DEVICE_PLANS)
@pytest.mark.parametrize('variant', ['S/14', 'L/16', 'R50+B/16', 'R50x1', 'EfficientNet-B0'])
def test_every_planned_setting_exists(platform, variant):
  settings = plan(pretrained(variant), platform)
  known = flatten_config(Config())
  assert settings.keys() <= known.keys()
  for name, choices in CHOICES.items():
    assert settings.get(name, choices[0]) in choices


def test_a_cpu_gets_at_most_a_hundred_patches_and_an_accelerator_the_size_of_the_model():
  # sqrt(100 / 256) of 16 rows is 10. 10 rows of 14 pixels.
  assert plan_size(pretrained(), 100) == (140, 140)
  # 16 x 32 patches: a factor of sqrt(100 / 512) gives 7 x 14.
  assert plan_size(pretrained(size=(224, 448)), 100) == (98, 196)
  assert plan(platform='gpu')['data.size'] == (224, 224)
  assert plan(pretrained('R50x1'))['data.size'] == (224, 224)


def test_a_cpu_evaluates_images_of_up_to_256_patches():
  # sqrt(256 / 1369) of 37 rows is 16. 16 rows of 14 pixels.
  assert plan(pretrained(size=(518, 518)))['data.eval_size'] == (224, 224)
  assert plan()['data.eval_size'] == (224, 224)
  # A model of 10 x 10 patches is trained at its size already.
  assert plan(pretrained(size=(140, 140)))['data.eval_size'] == (0, 0)
  assert plan(platform='gpu')['data.eval_size'] == (0, 0)


def test_the_resize_before_the_crop_shrinks_with_the_image():
  center = pretrained(crop='center', resize_size=(256, 256), interpolation='pil_bicubic')
  settings = plan(center)
  assert settings['data.eval_crop'] == 'center'
  assert (
    settings['data.eval_short_side'] == 256
  )  # That of the model, whose size is that of evaluation.
  assert settings['data.interpolation'] == 'pil_bicubic'
  assert 'data.eval_short_side' not in plan()


def test_a_size_that_the_user_gives_is_kept_with_the_resize_before_its_crop():
  center = pretrained(crop='center', resize_size=(256, 256))
  settings = plan_settings(
    center, 'cpu', source='folder:a', images=800, max_labels=1, keep_size=True
  )
  assert settings['data.size'] == (224, 224) and settings['data.eval_short_side'] == 256


def test_several_labels_of_an_image_mean_the_sigmoid_loss_and_a_head_of_zeros():
  settings = plan(max_labels=3)
  assert (settings['loss'], settings['init_head']) == ('sigmoid', 'new')
  assert (plan()['loss'], plan()['init_head']) == ('softmax', 'probe')


@pytest.mark.parametrize(
  ('counts', 'weights'),
  [
    ([160, 160, 160], 'none'), ([50, 149], 'none'), ([50, 150], 'balanced'),
    ([0, 50, 60], 'none'), (None, 'none'),
  ],
)  # fmt: skip
def test_classes_are_weighted_if_the_largest_has_three_times_the_images_of_the_smallest(
  counts, weights
):
  counts = None if counts is None else np.array(counts)
  settings = plan_settings(
    pretrained(), 'cpu', source='folder:a', images=99, max_labels=1, class_counts=counts
  )
  assert settings['class_weights'] == weights


def test_a_batch_is_not_larger_than_the_data_and_the_learning_rate_follows_its_root():
  settings = plan(images=5)
  assert settings['data.batch'] == 5
  assert settings['optim.lr'] == pytest.approx(2e-4 / 2)  # sqrt(5 / 20).
  assert plan()['optim.lr'] == pytest.approx(2e-4)


@pytest.mark.parametrize(
  ('platform', 'devices', 'images', 'batches'),
  [
    ('cpu', 1, 800, (20, 25)), ('cpu', 8, 800, (16, 24)), ('gpu', 6, 800, (126, 252)),
    ('tpu', 8, 100, (96, 256)), ('tpu', 512, 10**6, (512, 512)), ('gpu', 8, 5, (8, 256)),
  ],
)  # fmt: skip
def test_batches_are_the_largest_multiples_of_the_devices(platform, devices, images, batches):
  settings = plan_settings(
    pretrained(), platform, source='folder:a', images=images, max_labels=1, devices=devices
  )
  assert (settings['data.batch'], settings['data.eval_batch']) == batches


@pytest.mark.parametrize(
  ('images', 'epochs'), [(10, 30), (999, 30), (1000, 20), (50_000, 10), (500_000, 5), (10**7, 2)]
)
def test_more_images_get_fewer_epochs(images, epochs):
  assert plan(images=images)['epochs'] == epochs


@pytest.mark.parametrize(('variant', 'decay'), [('S/16', 0.8), ('L/16', 0.85), ('g/14', 0.9)])
def test_a_deeper_model_has_a_larger_factor_between_blocks(variant, decay):
  assert plan(pretrained(variant))['optim.layer_decay'] == decay


def test_a_model_without_blocks_has_no_layer_decay():
  assert 'optim.layer_decay' not in plan(pretrained('R50x1'))


def test_the_models_own_settings_are_the_plans():
  model = pretrained()
  config = dataclasses.replace(model.config, gelu='erf', mean=(1.0, 2.0, 3.0), pool='gap')
  settings = plan(dataclasses.replace(model, config=config, positions='bicubic'))
  assert settings['model.gelu'] == 'erf' and settings['model.mean'] == (1.0, 2.0, 3.0)
  assert settings['model.pool'] == 'gap' and settings['init_positions'] == 'bicubic'


def test_the_steps_fill_the_time_that_probe_and_evaluation_leave():
  # 1,200 images at 1/30 of a step each, since a step is three passes of 10 images: 40 s of 1 s steps.
  steps = fit_into_seconds(300, step=1.0, overhead=20, eval_images=1200, batch=10)
  assert steps == 300 - 20 - 40
  assert fit_into_seconds(10, step=1.0, overhead=20, eval_images=0, batch=10) < 0
  assert np.isclose(fit_into_seconds(100, step=0.5, overhead=0, eval_images=0, batch=1), 200)
