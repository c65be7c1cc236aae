"""The recipes after the paper: every argument is valid, and settings are those of their sources."""

import itertools
import re

import pytest

from vit_jax.config_checks import validate
from vit_jax.errors import UserError
from vit_jax.recipes import import_recipe, load_recipe, load_sweep_rates
from vit_jax.training.dry_run import dry_run


def module(name: str):
  return import_recipe(name)


# Table 2 of "Scaling Vision Transformers", and PaLI's ViT-e.
SCALING = (
  *('s/28', 's/16', 'S/32', 'Ti/16', 'B/32', 'S/16', 'B/28', 'B/16', 'L/16'),
  *('g/14', 'G/14', 'e/14'),
)


def arguments() -> list[str]:
  """Return every argument of every recipe here."""
  augreg, deit3 = module('augreg'), module('deit3')
  sweep = itertools.product(
    augreg.MODELS, augreg.DATA, augreg.AUGMENTATIONS, ('0.1', '0.03'), ('0.0', '0.1')
  )
  found = [f'augreg:{",".join(each)}' for each in sweep]
  found += [
    f'augreg:{",".join(each)}' for each in itertools.product(augreg.MODELS, augreg.FINETUNING)
  ]
  plain = module('plain_vit')
  found += [
    f'plain_vit:S/16,{epochs},{change}' for epochs in plain.EPOCHS for change in plain.CHANGES
  ]
  found += [f'deit3:{",".join(each)}' for each in deit3.STAGES]
  found += [f'scaling:{model}{stage}' for model in SCALING for stage in ('', ',finetune_imagenet')]
  cifar = module('cifar')
  found += [f'cifar:{",".join(each)}' for each in itertools.product(cifar.RECIPES, cifar.DATA)]
  distill = module('distill')
  bit = [f'BiT-R152x2,BiT-R50x1,{data},{epochs}' for data, epochs in distill.SCHEDULES]
  others = [f'{name},S/16,imagenet,300' for name in (*distill.VIT_TEACHERS, *distill.EFFICIENTNETS)]
  found += [f'distill:{each}' for each in bit + others]
  return found + [
    f'sam:{model},{rule}' for model in ('S/16', 'B/32') for rule in module('sam').RULES
  ]


def test_every_argument_gives_a_valid_config():
  found = arguments()
  assert len(found) == len(set(found)) > 800
  for name in found:
    validate(load_recipe(name))


@pytest.mark.parametrize(
  'name',
  [
    'augreg:S/16,imagenet,light1',
    'augreg:Ti/16,imagenet21k,strong2,0.03,0.1',
    'augreg:R26+S/32,imagenet21k_30',
    'augreg:B/16,finetune_pets',
    'plain_vit:S/16,90,original',
    'deit3:S/16,imagenet',
    'deit3:B/16,imagenet_224',
    'deit3:L/16,imagenet21k',
    'deit3:H/14,imagenet21k_to_1k',
    'sam:S/16',
    'sam:B/32,gsam',
    'scaling:B/28',
    'scaling:g/14',
    'scaling:G/14,finetune_imagenet',
    'scaling:e/14',
    'cifar:vit_lite',
    'cifar:spt_lsa',
    'cifar:vit_cifar,cifar100',
    'cifar:vit_512_short',
    'cifar:vit_512_long',
    'cifar:scratch',
    'cifar:fast',
    'distill:B/8,S/16,imagenet,300',
    'distill:EfficientNet-B0,Ti/16,imagenet,300',
    'distill:BiT-R152x2,BiT-R50x1,flowers,10000',
  ],
)
def test_a_dry_run_traces_the_step_and_prints_length_and_settings(name):
  lines = dry_run(load_recipe(name))
  assert 'steps' in lines[2] and 'exaFLOPs' in lines[3]
  assert any(line.startswith('config.optim.lr=') for line in lines)


def test_a_dry_run_counts_the_examples_of_a_slice():
  lines = dry_run(load_recipe('plain_vit:S/16'))
  assert '1,268,355 examples' in lines[1]  # 99 % of 1,281,167, rounded.
  assert '111,477 steps' in lines[2]  # 90 epochs of 1,268,355 / 1,024.


def test_a_dry_run_of_distillation_counts_the_teacher_and_does_not_read_it():
  lines = dry_run(load_recipe('distill:B/8,Ti/16,imagenet,300'))
  line = next(line for line in lines if line.startswith('teacher '))
  assert 'B/8, 86,576,872 parameters' in line  # timm's vit_base_patch8_224.
  student, teacher, step = (
    float(re.search(pattern, '\n'.join(lines))[1])
    for pattern in (r'([\d.]+) G for a forward', r'([\d.]+) G of the FLOPs', r'([\d.]+) T for a')
  )
  assert step * 1e3 == pytest.approx(1024 * (3 * student + teacher), rel=1e-3)


def test_the_recipe_of_distillation_has_the_settings_of_big_vision():
  """proj/distill: bit_i1k.py and bigsweep_flowers_pet.py."""
  config = load_recipe('distill:BiT-R152x2,BiT-R50x1,imagenet')
  assert (config.epochs, config.data.batch, config.optim.warmup) == (1200, 4096, '5000')
  assert (config.distill.temperature, config.distill.weight, config.mixup) == (1, 1, 1)
  assert config.optim.lr * config.optim.weight_decay == pytest.approx(3e-4)
  flowers = load_recipe('distill:BiT-R152x2,BiT-R50x1,flowers,10000')
  assert (flowers.distill.temperature, flowers.optim.lr, flowers.data.size) == (
    10,
    3e-3,
    (128, 128),
  )
  assert flowers.optim.lr * flowers.optim.weight_decay == pytest.approx(3e-4)


def test_the_28_settings_of_augreg_differ():
  """arXiv 2106.10270: 7 augmentations, 2 weight decays, with dropout and without."""
  sweep = itertools.product(module('augreg').AUGMENTATIONS, ('0.1', '0.03'), ('0.0', '0.1'))
  made = [load_recipe(f'augreg:B/16,imagenet,{",".join(each)}') for each in sweep]
  assert len(made) == 28
  assert all(a != b for a, b in itertools.combinations(made, 2))
  light = load_recipe('augreg:B/16,imagenet,light1')
  assert (light.data.randaug_ops, light.data.randaug_magnitude, light.mixup) == (2, 0.0, 0.0)
  assert load_sweep_rates('augreg:B/16,finetune_imagenet') == (0.01, 0.03)


def test_each_ablation_of_the_plain_vit_changes_what_it_names():
  """arXiv 2205.01580, the table of ablations."""
  base = load_recipe('plain_vit:S/16,150')
  assert (base.data.batch, base.model.pool, base.model.position) == (1024, 'gap', 'sincos2d')
  assert (base.epochs, base.mixup, base.data.randaug_magnitude) == (150, 0.2, 10)
  assert base.model.hidden_head and base.loss == 'softmax'
  changed = lambda name: load_recipe(f'plain_vit:S/16,150,{name}')
  assert not changed('linear_head').model.hidden_head
  assert changed('batch_4096').data.batch == 4096
  assert changed('learned_positions').model.position == 'learned'
  assert changed('class_token').model.pool == 'token'
  assert changed('no_augmentation').mixup == changed('no_augmentation').data.randaug_ops == 0


def test_gsam_has_the_radius_and_alpha_of_its_model():
  """arXiv 2203.08065, Table 4. A last radius of 0 is 1e-6 here, since 0 keeps it constant."""
  table = {'S/32': (0.0, 0.4), 'S/16': (0.0, 1.0), 'B/32': (0.1, 0.6), 'B/16': (0.2, 0.4)}
  for model, (low, alpha) in table.items():
    optim = load_recipe(f'sam:{model},gsam').optim
    assert (optim.sam_rho, optim.gsam_alpha, optim.weight_decay) == (0.6, alpha, 0.3)
    assert 0 < optim.sam_rho_min == pytest.approx(low, abs=1e-5)
  assert load_recipe('sam:B/16,adamw').optim.sam_rho == 0


def test_large_models_have_the_batches_steps_and_decays_of_their_authors():
  """arXiv 2106.04560, Appendices B, C and D."""
  assert tuple(module('scaling').MODELS) == SCALING
  for model, batch, steps in (('L/16', 4096, 4_000_000), ('g/14', 16_384, 1_000_000)):
    config = load_recipe(f'scaling:{model}')
    assert (config.data.batch, config.steps, config.optim.name) == (batch, steps, 'adafactor')
    assert (config.optim.b1, config.optim.b2, config.optim.lr) == (0.9, 0.999, 8e-4)
    decay, factor = config.optim.weight_decay, config.optim.head_weight_decay_factor
    assert (decay, decay * factor) == (0.03, pytest.approx(3.0))
    assert (config.optim.warmup, config.optim.cooldown) == ('10000', '50000')
  for model, side in (('B/28', 364), ('L/16', 384), ('g/14', 518), ('G/14', 518)):
    config = load_recipe(f'scaling:{model},finetune_imagenet')
    assert (config.data.size, config.data.batch, config.steps) == ((side, side), 512, 20_000)
    assert (config.optim.name, config.optim.weight_decay) == ('sgd', 0.0)
    assert (config.optim.schedule == 'constant') == (config.optim.ema > 0) == (model == 'G/14')
  assert load_sweep_rates('scaling:g/14,finetune_imagenet') == (0.01, 0.03)


@pytest.mark.parametrize(
  ('name', 'millions'),
  [
    ('vit_lite', 3.717),  # Compact-Transformers, examples/README.md.
    ('vit_cifar', 6.3),  # omihub777/ViT-CIFAR, README.
  ],
)
def test_models_for_cifar_have_as_many_parameters_as_their_authors_state(name, millions):
  model, *_ = dry_run(load_recipe(f'cifar:{name}'))
  count = int(re.search(r'([\d,]+) parameters', model)[1].replace(',', ''))
  assert count / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
  'name',
  [
    'augreg:S/15,imagenet',
    'augreg:S/16',
    'augreg:S/16,imagenet,light3',
    'augreg:S/16,imagenet,light1,0.2',
    'augreg:S/16,finetune_pets,light1',
    'plain_vit:S/16,91',
    'plain_vit:S/16,90,linear',
    'deit3:B/16',
    'deit3:B/16,imagenet22k',
    'sam:B/16,sma',
    'scaling:H/14',
    'scaling:g/14,finetune_pets',
    'cifar:vit_light',
    'cifar:vit_lite,cifar11',
    'distill:BiT-R152x2,BiT-R50x1',
    'distill:B/8,S/16,flowers',
    'distill:BiT-R152x2,BiT-R50x1,food,99',
  ],
)
def test_another_argument_is_an_error_that_names_the_recipe(name):
  with pytest.raises(UserError, match=name.partition(':')[0]):
    load_recipe(name)
