"""Every setting has an effect in some config, and is refused where the others leave it without one.

`CASES` has one row for each setting: an observation, a value, and the other settings of the config.
The observation must differ between this value and the default.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.config_observations import (
  TINY,
  bad_images,
  batches,
  forward,
  initial_params,
  initialization,
  jaxpr,
  length,
  loader,
  optimizer,
  program,
  run,
  schedule,
  shardings,
)
from vit_jax.config import Config
from vit_jax.config_checks import validate
from vit_jax.data.pseudo_labels import (
  describe_pseudo_labels,
  start_pseudo_labels,
  write_best_labels,
  write_probabilities,
)
from vit_jax.data.sources import open_unlabelled
from vit_jax.errors import UserError
from vit_jax.settings.conditions import READ_ONLY_WHEN
from vit_jax.settings.fields import flatten_config, with_settings
from vit_jax.train import train

DEFAULTS = flatten_config(Config())


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> dict[str, str]:
  """Return {name: path} of data and runs. A setting of a case contains `{name}`."""
  root = tmp_path_factory.mktemp('folders')
  rng = np.random.default_rng(0)
  for folder in itertools.product(('photos', 'paintings'), ('train', 'test'), '0123456789'):
    root.joinpath(*folder).mkdir(parents=True)
    for i in range(2):
      image = rng.integers(0, 256, (9, 9, 3), np.uint8)
      cv2.imwrite(str(root.joinpath(*folder) / f'{i}.png'), image)
  exif = Image.Exif()
  exif[0x0112] = 6  # Stored sideways.
  for folder in itertools.product(('snaps',), ('train', 'test'), '0123456789'):
    root.joinpath(*folder).mkdir(parents=True)
    for i in range(2):
      image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
      image.save(root.joinpath(*folder) / f'{i}.jpg', exif=exif, quality=80)
  (root / 'photos' / 'train' / '3' / '0.png').write_bytes(b'broken')
  source = open_unlabelled('builtin:digits', 'train[64:128]')
  for name, seed in (('labels', 0), ('others', 1)):
    p = np.random.default_rng(seed).dirichlet(np.full(10, 0.3), 64)
    start_pseudo_labels(root / name, describe_pseudo_labels(source, tuple('0123456789')))
    write_probabilities(root / name, 0, p)
    write_best_labels(root / name, 1)
  train(with_settings(TINY, {'steps': 1, 'seed': 1}), root / 'pretrained')
  return {path.name: str(path) for path in root.iterdir()}


eval_images = functools.partial(batches, evaluation=True)

HYBRID = {'model.variant': 'R1.1+Ti/8', 'data.size': (32, 32)}
LARGE_BATCHES = {'data.train': 'builtin:fashion_mnist', 'data.batch': 256, 'data.size': (224, 224)}
LARGE_BATCHES |= {'data.split': 'train', 'data.eval_split': 'test'}
PHOTOS = {'data.train': 'folder:{photos}', 'data.split': 'train', 'data.eval_split': 'test'}
SNAPS = PHOTOS | {'data.train': 'folder:{snaps}'}
BROKEN = {'data.bad_images': 'skip'} | PHOTOS
MIXTURE = {
  'data.unlabelled': 'builtin:digits',
  'data.unlabelled_split': 'train[64:128]',
  'data.pseudo_labels': '{labels}',
}
DECAY = {'optim.weight_decay': 0.1}
SAM = {'optim.sam_rho': 0.1}
STAIRCASE = {'optim.schedule': 'staircase', 'optim.lr_boundaries': '50%'}
MASK = {'mask.target': 'colour'}
INIT = {'init': '{pretrained}'}
LORA = INIT | {'lora.rank': 2}
DISTILL = {'distill.teacher': '{pretrained}'}


@dataclasses.dataclass(frozen=True)
class Case:
  """An observation that tells `value` from `baseline`, in a config with `settings`.

  `with_value` and `without_value` are settings that only one of the two configs has.
  """

  observe: Callable
  value: object
  settings: dict = dataclasses.field(default_factory=dict)
  baseline: object = None  # None means the default.
  with_value: dict = dataclasses.field(default_factory=dict)
  without_value: dict = dataclasses.field(default_factory=dict)


# One case for each setting.
CASES = {
  'data.train': Case(batches, 'builtin:digits'),
  'data.split': Case(batches, 'train[64:]'),
  'data.eval': Case(eval_images, 'folder:{paintings}', PHOTOS),
  'data.eval_split': Case(eval_images, 'test[32:64]'),
  'data.dir': Case(batches, '/nowhere', {'data.train': 'tfds:absent'}),
  'data.unlabelled': Case(batches, 'builtin:digits', with_value=MIXTURE),
  'data.unlabelled_split': Case(batches, 'train[64:128]', MIXTURE),
  'data.unlabelled_ratio': Case(batches, 3, MIXTURE),
  'data.pseudo_labels': Case(batches, '{others}', MIXTURE),
  'data.confidence_threshold': Case(batches, 0.9, MIXTURE),
  'data.unlabelled_per_class': Case(batches, 2, MIXTURE),
  'data.batch': Case(batches, 16),
  'data.eval_batch': Case(eval_images, 16),
  'data.size': Case(batches, (12, 12)),
  'data.crop': Case(batches, 'resize'),
  'data.crop_area': Case(batches, (0.5, 0.6)),
  'data.crop_aspect': Case(batches, (1.0, 1.1)),
  'data.resize_before_crop': Case(batches, 12, {'data.crop': 'random'}, baseline=9),
  'data.randaug_ops': Case(batches, 2),
  'data.randaug_magnitude': Case(batches, 9.0, {'data.randaug_ops': 2}, baseline=3.0),
  'data.randaug_variant': Case(
    batches, 'noisystudent', {'data.randaug_ops': 2, 'data.randaug_magnitude': 27.0}
  ),
  'data.flip': Case(batches, False),
  'data.three_augment': Case(batches, True),
  'data.color_jitter': Case(batches, 0.3),
  'data.random_erasing': Case(batches, 1.0),
  'data.repeats': Case(batches, 2),
  'data.train_interpolation': Case(batches, 'pil_bicubic'),
  'data.eval_crop': Case(eval_images, 'center'),
  'data.eval_size': Case(eval_images, (12, 12)),
  'data.eval_short_side': Case(eval_images, 12, {'data.eval_crop': 'center'}),
  'data.interpolation': Case(eval_images, 'pil_bicubic', {'data.size': (12, 12)}),
  'data.orient': Case(batches, 'ignore', SNAPS),
  'data.jpeg_dct': Case(eval_images, 'fast', SNAPS | {'data.size': (12, 9)}),
  'data.bad_images': Case(batches, 'skip', PHOTOS),
  'data.max_bad_fraction': Case(bad_images, 0.5, {'data.bad_images': 'skip'}),
  'data.max_pixels': Case(batches, 80, BROKEN),
  'data.workers': Case(loader, 1),
  'data.threads': Case(loader, 1, LARGE_BATCHES),
  'model.variant': Case(forward, 'mu/2', baseline='mu/4'),
  'model.width': Case(forward, 16),
  'model.depth': Case(forward, 3),
  'model.mlp': Case(forward, 16),
  'model.heads': Case(forward, 4),
  'model.stem_width': Case(forward, 32, HYBRID),
  'model.pool': Case(forward, 'gap'),
  'model.hidden_head': Case(forward, True),
  'model.head_bias': Case(initialization, -10.0),
  'model.class_token': Case(forward, True, {'model.pool': 'gap'}),
  'model.position': Case(forward, 'none'),
  'model.distillation_token': Case(forward, True),
  'model.rope_theta': Case(forward, 10.0, {'model.position': 'rope'}),
  'model.rope_grid': Case(forward, 4, {'model.position': 'rope'}),
  'model.rope_register_theta': Case(
    forward, 10.0, {'model.position': 'rope', 'model.registers': 4}
  ),
  'model.position_at': Case(forward, 'every'),
  'model.registers': Case(forward, 2),
  'model.patch_norm': Case(forward, True),
  'model.pre_norm': Case(forward, True),
  'model.fc_norm': Case(forward, True, {'model.pool': 'gap'}),
  'model.qk_norm': Case(forward, True),
  'model.qkv_bias': Case(forward, 'none'),
  'model.patch_bias': Case(forward, False),
  'model.layer_scale': Case(forward, 0.1),
  'model.swiglu': Case(forward, True),
  'model.mlp_norm': Case(forward, True),
  'model.norm': Case(forward, 'rmsnorm'),
  'model.attention': Case(jaxpr, 'pallas'),
  'model.dropout': Case(forward, 0.1),
  'model.drop_path': Case(forward, 0.1),
  'model.drop_path_schedule': Case(forward, 'uniform', {'model.drop_path': 0.1}),
  'model.gelu': Case(forward, 'erf'),
  'model.norm_eps': Case(forward, 1e-5),
  'model.channels': Case(initialization, 1),
  'model.mean': Case(forward, (1.0, 2.0, 3.0)),
  'model.scale': Case(forward, (1.0, 2.0, 3.0)),
  'model.dtype': Case(forward, 'bfloat16'),
  'model.remat': Case(program, 'full'),
  'model.unroll': Case(forward, 0),
  'optim.name': Case(optimizer, 'rmsprop'),
  'optim.lr': Case(schedule, 0.2),
  'optim.schedule': Case(schedule, 'linear'),
  'optim.warmup': Case(schedule, '10%'),
  'optim.cooldown': Case(schedule, '1ep'),
  'optim.lr_end': Case(schedule, 0.01),
  'optim.rsqrt_timescale': Case(schedule, 5, {'optim.schedule': 'rsqrt'}),
  'optim.lr_boundaries': Case(schedule, '5,10', STAIRCASE | {'optim.lr_boundary_every': '8'}),
  'optim.lr_boundary_every': Case(schedule, '1ep', STAIRCASE),
  'optim.lr_boundary_factor': Case(schedule, 0.5, STAIRCASE),
  'optim.b1': Case(optimizer, 0.5),
  'optim.b2': Case(optimizer, 0.5, {'optim.name': 'adamw'}),
  'optim.muon_momentum': Case(optimizer, 0.9, {'optim.name': 'muon'}),
  'optim.momentum_dtype': Case(optimizer, 'bfloat16'),
  'optim.weight_decay': Case(optimizer, 0.1),
  'optim.coupled_weight_decay': Case(optimizer, True, DECAY),
  'optim.head_weight_decay_factor': Case(optimizer, 3.0, DECAY),
  'optim.weight_decay_mask': Case(optimizer, '.*/kernel', DECAY),
  'optim.grad_clip_norm': Case(optimizer, 1.0),
  'optim.freeze': Case(optimizer, 'head/.*'),
  'optim.layer_decay': Case(optimizer, 0.5),
  'optim.ema': Case(program, 0.9),
  'optim.norm_momentum': Case(optimizer, 0.9),
  'optim.grad_dtype': Case(program, 'bfloat16'),
  'optim.grad_accum_steps': Case(program, 2),
  'optim.skip_spikes': Case(program, 5.0),
  'optim.spike_window': Case(optimizer, 16, {'optim.skip_spikes': 5.0}),
  'optim.sam_rho': Case(program, 0.1),
  'optim.sam_rho_min': Case(program, 0.05, SAM),
  'optim.gsam_alpha': Case(program, 0.5, SAM),
  'mask.target': Case(forward, 'colour'),
  'mask.rate': Case(forward, 0.25, MASK),
  'lora.rank': Case(forward, 2, INIT),
  'lora.alpha': Case(forward, 3.0, LORA),
  'lora.targets': Case(forward, '.*/MlpBlock_3/.*', LORA),
  'lora.train': Case(program, '.*/bias|head/.*', LORA),
  'distill.teacher': Case(program, '{pretrained}'),
  'distill.variant': Case(program, 'mu/2', DISTILL),
  'distill.temperature': Case(program, 2.0, DISTILL),
  'distill.weight': Case(program, 0.5, DISTILL),
  'mesh.fsdp': Case(shardings, 2, {'model.width': 256}),
  'steps': Case(length, 9, without_value={'epochs': 1.0}),
  'epochs': Case(length, 3.0, without_value={'steps': 9}),
  'seed': Case(batches, 1),
  'loss': Case(program, 'sigmoid'),
  'sigmoid_reduction': Case(program, 'mean', {'loss': 'sigmoid'}),
  'target_threshold': Case(program, 0.2, {'loss': 'sigmoid'}),
  'class_weights': Case(program, 'balanced'),
  'label_smoothing': Case(program, 0.1),
  'mixup': Case(program, 0.2),
  'cutmix': Case(program, 1.0),
  'cutmix_probability': Case(program, 0.2, {'mixup': 0.2, 'cutmix': 1.0}),
  'init': Case(initial_params, '{pretrained}'),
  'init_positions': Case(initial_params, 'bicubic', INIT | {'data.size': (16, 16)}),
  'init_head': Case(initial_params, 'keep', INIT),
}


# Pairs of runs: the settings of both, and those of the second, each with the part of the result in
# which it shows. The first run has these settings from TINY.
PROBE = {'probes': ('fewshot:builtin:digits',), 'max_to_keep': 3, 'data.eval_batch': 256}
RUNS = [
  (
    {},
    {
      'data.prefetch': (60, 'many batches decoded'),
      'log_ids': (True, 'ids'),
      'writers': (('mlflow',), 'tracked'),
      'profile': ('2:4', 'traces'),
      'log_every': ('2', 'train records'),
      'eval_every': ('2', 'test records'),
      'keep_every': ('1', 'checkpoints'),
      'first_step_timeout': (2300.0, 'seconds'),
      'step_timeout': (500.0, 'seconds'),
    },
  ),
  (
    {'data.eval_batch': 256},
    {'probes': (('fewshot:builtin:digits',), 'probe records'), 'max_to_keep': (3, 'checkpoints')},
  ),
  (
    PROBE,
    {
      'probe_every': ('2', 'probe records'),
      'fewshot_l2': (1e6, 'last probe'),
      'save_every': ('2', 'checkpoints'),
    },
  ),
  ({'optim.lr': 1e30, 'steps': 8}, {'optim.max_bad_steps': (2, 'error')}),
]
VALUES = {name: case.value for name, case in CASES.items()}
VALUES |= {name: value for _, changes in RUNS for name, (value, _) in changes.items()}

# Setting -> settings with which it is refused. The others have their defaults.
REFUSED = {
  'data.dir': [{'data.train': 'folder:a', 'probes': ('knn:builtin:digits',)}],
  'data.unlabelled': [MASK],
  'data.unlabelled_split': [{}],
  'data.unlabelled_ratio': [{}],
  'data.pseudo_labels': [{}],
  'data.confidence_threshold': [{}],
  'data.unlabelled_per_class': [{}],
  'data.crop_area': [{'data.crop': 'resize'}],
  'data.crop_aspect': [{'data.crop': 'resize'}],
  'data.resize_before_crop': [{}, {'data.crop': 'resize'}],
  'data.randaug_magnitude': [{}],
  'data.randaug_variant': [{}],
  'data.repeats': [{'data.unlabelled': 'images:a'}],
  'data.eval_size': [MASK],
  'data.eval_short_side': [{}, {'data.eval_crop': 'none'}],
  'data.orient': [{}],
  'data.jpeg_dct': [{}],
  'data.max_bad_fraction': [{}],
  'model.class_token': [{}, {'model.pool': 'map'}],
  'model.fc_norm': [{}, {'model.pool': 'gap'} | MASK],
  'model.distillation_token': [{'model.pool': 'gap'}, {'model.pool': 'map'}],
  'model.drop_path_schedule': [{}],
  'model.rope_theta': [{}],
  'model.rope_grid': [{}],
  'model.rope_register_theta': [{'model.registers': 4}, {'model.position': 'rope'}],
  'model.gelu': [{'model.swiglu': True}],
  'model.hidden_head': [MASK],
  'model.head_bias': [MASK],
  'optim.lr_end': [
    {'optim.schedule': 'constant'},
    {'optim.schedule': 'rsqrt'},
    {'optim.schedule': 'staircase', 'optim.lr_boundaries': '5'},
  ],
  'optim.rsqrt_timescale': [{}],
  'optim.lr_boundaries': [{}],
  'optim.lr_boundary_every': [{}],
  'optim.lr_boundary_factor': [{}],
  'optim.b2': [{'optim.name': 'sgd'}],
  'optim.muon_momentum': [{}],
  'optim.coupled_weight_decay': [{}],
  'optim.head_weight_decay_factor': [{}, DECAY | {'optim.coupled_weight_decay': True}],
  'optim.weight_decay_mask': [{}],
  'optim.spike_window': [{}],
  'optim.sam_rho_min': [{}, SAM | {'optim.schedule': 'constant'}],
  'optim.gsam_alpha': [{}],
  'mask.rate': [{}],
  'optim.freeze': [LORA],
  'lora.rank': [{}, INIT | MASK],
  'lora.alpha': [{}],
  'lora.targets': [{}],
  'lora.train': [{}],
  'distill.teacher': [MASK, {'loss': 'sigmoid'}, {'data.unlabelled': 'builtin:digits'}],
  'distill.variant': [{}],
  'distill.temperature': [{}],
  'distill.weight': [{}],
  'loss': [MASK],
  'class_weights': [MASK, {'loss': 'sigmoid'}, DISTILL],
  'sigmoid_reduction': [{}],
  'target_threshold': [{}, {'loss': 'sigmoid', 'data.unlabelled': 'builtin:digits'}],
  'label_smoothing': [MASK, {'loss': 'sigmoid', 'target_threshold': 0.2}, DISTILL],
  'mixup': [MASK],
  'cutmix': [MASK],
  'cutmix_probability': [{}, {'mixup': 0.2}, {'cutmix': 1.0}],
  'init_positions': [{}, INIT | {'model.position': 'relative2d'}],
  'init_head': [{}, INIT | MASK],
  'probe_every': [{}],
  'fewshot_l2': [{}, {'probes': ('knn:builtin:digits',)}],
}


@functools.cache
def observed(observe: Callable, settings: tuple) -> object:
  """Return the observation of TINY with these settings."""
  return observe(validate(with_settings(TINY, dict(settings))))


def test_every_setting_has_a_case():
  assert CASES.keys() | VALUES.keys() == DEFAULTS.keys()
  assert REFUSED.keys() == READ_ONLY_WHEN.keys()


@pytest.mark.parametrize('name', CASES)
def test_the_setting_has_an_effect(name, folders):
  case = CASES[name]
  baseline = DEFAULTS[name] if case.baseline is None else case.baseline
  results = []
  for settings in (
    case.settings | case.without_value | {name: baseline},
    case.settings | case.with_value | {name: case.value},
  ):
    if case.observe is length:
      settings = {'steps': 0, 'epochs': 0.0} | settings
    fill = {k: v.format(**folders) if isinstance(v, str) else v for k, v in settings.items()}
    results.append(observed(case.observe, tuple(sorted(fill.items()))))
  assert case.value != baseline
  assert results[0] != results[1]


@pytest.mark.parametrize(('common', 'changes'), RUNS, ids=[', '.join(row[1]) for row in RUNS])
def test_the_settings_change_a_run(common, changes, tmp_path):
  first = with_settings(TINY, common)
  second = with_settings(first, {name: value for name, (value, _) in changes.items()})
  before, after = (run(validate(c), tmp_path / str(i)) for i, c in enumerate((first, second)))
  assert not {part for _, part in changes.values() if before[part] == after[part]}


@pytest.mark.parametrize('observe', [program, optimizer, eval_images])
def test_an_observation_of_one_config_is_always_the_same(observe):
  assert observe(validate(TINY)) == observe(validate(TINY))


@pytest.mark.parametrize('name', READ_ONLY_WHEN)
def test_a_setting_without_effect_is_refused_with_its_name_value_and_remedy(name):
  value = VALUES[name]
  for settings in REFUSED[name]:
    assert validate(with_settings(Config(steps=10), settings))
    with pytest.raises(UserError) as error:
      validate(with_settings(Config(steps=10), settings | {name: value}))
    text = str(error.value)
    assert text.startswith(f'config.{name}={value!r} ') and repr(DEFAULTS[name]) in text
    needed = {other for needs in READ_ONLY_WHEN[name] for other in needs}
    assert any(f'config.{other}' in text for other in needed)


def test_a_default_is_never_refused():
  for name, cases in REFUSED.items():
    for settings in cases:
      assert validate(with_settings(Config(steps=10), settings | {name: DEFAULTS[name]}))


def test_the_momentum_of_batch_norm_is_refused_for_a_model_without_it():
  with pytest.raises(UserError, match=r'config\.optim\.norm_momentum=0\.9'):
    program(with_settings(TINY, {'optim.norm_momentum': 0.9}))
