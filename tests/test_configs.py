"""Every config is valid with every documented argument, and its training step can be traced."""

import functools
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax.config import Config
from vit_jax.config_checks import validate
from vit_jax.data.mixup import make_mix
from vit_jax.models.families import build_model
from vit_jax.optim.durations import parse_duration
from vit_jax.optim.optimizer import make_lr_schedule, make_optimizer
from vit_jax.step import abstract_params, init_state, train_step
from vit_jax.training.task import make_task

CONFIGS = Path(__file__).parents[1] / 'configs'
CLASSES = {
  'imagenet': 1000,
  'imagenet21k': 21_843,
  'jft': 18_291,
  'cifar100': 100,
  'pets': 37,
  'flowers': 102,
}
EXAMPLES = {'imagenet': 1_281_167, 'imagenet21k': 12_743_321, 'jft': 303_000_000}


def load_module(name: str):
  """Return the module of configs/NAME.py."""
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
  return made


QUICK = ('Ti/16', 'S/16', 'B/16', 'B/32', 'L/16', 'L/32', 'H/14')
CONVOLUTIONAL = re.compile(r'(BiT-|Axial)?R\d+[x+]|B\d$')  # Unrolled, so slow to trace.


def arguments() -> list:
  """Return (config, argument) cases; those that trace slowly are marked."""
  cases = [('quickstart', None), ('quickstart_finetune', None), ('scaling', 'G/14')]
  cases += [('mini', f'{model},cifar10') for model in load_module('mini').MODELS]
  cases += [('mini', f'ViT-S,{data}') for data in ('fashion_mnist', 'digits', 'flowers')]
  for (variant, data), (epochs, *_) in load_module('pretrain').RECIPES.items():
    cases.append(('pretrain', f'{variant},{data}'))
    cases += [('pretrain', f'{variant},{data},{count}') for count in epochs[1:]]
  cases += [
    ('finetune', f'B/16,vtab/{task}') for task in ('caltech101', 'clevr_count', 'dsprites_location')
  ]
  for data in load_module('finetune').RECIPES:
    cases += [('finetune', f'{variant},{data}') for variant in QUICK]
  cases += [('finetune', 'R50x1,cifar10')]
  cases += [('self_supervised', 'B/16,imagenet')]
  cases += [('noisy_student', argument) for argument in ('mini', 'mini,3', 'B0', 'B7', 'L2,14')]
  cases += [
    ('bit_pretrain', argument) for argument in ('R50x1,jft,7', 'R152x2,jft,7', 'BiT-R50x1,imagenet')
  ]
  cases += [('bit_finetune', f'{variant},cifar10') for variant in ('R50x1', 'BiT-R152x4')]
  return [
    pytest.param(*case, marks=pytest.mark.slow if CONVOLUTIONAL.match(case[1] or '') else ())
    for case in cases
  ]


@pytest.mark.parametrize(
  ('name', 'recipes'), [('bit_pretrain', 'RECIPES'), ('bit_finetune', 'TASKS')]
)
def test_every_data_set_of_a_table_has_a_valid_config(name, recipes):
  for data in getattr(load_module(name), recipes):
    assert config_of(name, f'R50x1,{data}').model.variant == 'R50x1'


def config_of(name: str, argument: str | None):
  get_config = load_module(name).get_config
  return validate(get_config(argument) if argument else get_config())


def assert_a_step_traces(config: Config, *, classes: int, steps: int):
  """Trace a step, and compare the shapes of the state before and after it."""
  task = make_task(config)
  model = task.build_model(classes)
  lr = make_lr_schedule(config.optim, steps=steps, epoch=1000)
  tx = make_optimizer(config.optim, lr, abstract_params(model, config.data.size))
  state = jax.eval_shape(
    functools.partial(
      init_state, 0, model=model, tx=tx, size=config.data.size, ema=config.optim.ema > 0
    )
  )
  b = 2 * config.optim.grad_accum_steps
  batch = {
    'image': jax.ShapeDtypeStruct((b, *config.data.size, 3), np.uint8),
    'label': jax.ShapeDtypeStruct((b, 1), np.int32),
    'mask': jax.ShapeDtypeStruct((b,), bool),
  }
  step = functools.partial(
    train_step,
    model=model,
    tx=tx,
    loss=task.loss,
    lr=lr,
    seed=0,
    mix=make_mix(
      mixup_alpha=config.mixup,
      cutmix_alpha=config.cutmix,
      cutmix_probability=config.cutmix_probability,
    ),
    grad_accum_steps=config.optim.grad_accum_steps,
    ema=config.optim.ema,
  )
  new, metrics = jax.eval_shape(step, state, batch)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert metrics['loss'].shape == ()


@pytest.mark.parametrize(('name', 'argument'), arguments())
def test_a_step_of_the_config_traces(name, argument):
  config = config_of(name, argument)
  data = (argument or '').partition(',')[2].partition(',')[0]
  steps, epoch = (
    config.steps or 1000 * round(config.epochs),
    EXAMPLES.get(data, 10_000) / config.data.batch,
  )
  assert_a_step_traces(config, classes=CLASSES.get(data, 10), steps=steps)
  for name in ('log_every', 'eval_every', 'save_every', 'keep_every'):
    assert parse_duration(getattr(config, name), name=name, steps=steps, epoch=epoch) <= steps


def test_epochs_of_table_3_give_the_steps_of_the_reference():
  """arXiv 2010.11929: batches of 4,096. The reference implementation gives the steps."""
  known = {
    'B/16,jft': 518_000,
    'L/16,jft,14': 1_036_000,
    'L/16,imagenet,300': 93_800,
    'B/16,imagenet': 93_800,
  }
  for argument, steps in known.items():
    config = config_of('pretrain', argument)
    assert config.data.batch == 4096
    assert config.epochs * EXAMPLES[argument.split(',')[1]] / 4096 == pytest.approx(steps, rel=2e-3)


def test_vit_g_has_the_published_parameters_and_a_hundred_times_the_weight_decay_on_its_head():
  """arXiv 2106.04560: 1,843 million without pooling and head; weight decays of 0.03 and 3."""
  config = config_of('scaling', 'G/14')
  sizes = jax.tree.map(
    lambda leaf: leaf.size, abstract_params(build_model(config.model, 29_593), config.data.size)
  )
  pooling, head = (sum(jax.tree.leaves(sizes[name])) for name in ('MAPHead_0', 'head'))
  assert sum(jax.tree.leaves(sizes)) - pooling - head == pytest.approx(1_843e6, rel=1e-3)
  assert (
    config.optim.weight_decay,
    config.optim.weight_decay * config.optim.head_weight_decay_factor,
  ) == (
    0.03,
    pytest.approx(3.0),
  )


def test_bit_lowers_the_rate_at_the_same_parts_of_a_run_of_any_length():
  """arXiv 1912.11370, section 3.2: JFT in 40 epochs, boundaries after 10, 23, 30 and 37."""
  for argument in ('R50x1,jft', 'R50x1,jft,7'):
    assert config_of('bit_pretrain', argument).optim.lr_boundaries == '25%,57.5%,75%,92.5%'


@pytest.mark.parametrize(
  ('argument', 'epochs', 'every'),
  [('B0', 350, '2.4ep'), ('B0,1', 700, '4.8ep'), ('B7,3', 350, '2.4ep'), ('L2,14', 350, '2.4ep')],
)
def test_students_up_to_b4_have_a_schedule_of_twice_the_length(argument, epochs, every):
  """The scripts of google-research/noisystudent."""
  config = config_of('noisy_student', argument)
  assert (config.epochs, config.optim.lr_boundary_every) == (epochs, every)


def test_fine_tuning_is_at_384_pixels_or_the_next_multiple_of_the_patch_below():
  assert config_of('finetune', 'B/16,cifar10').data.size == (384, 384)
  assert config_of('finetune', 'H/14,cifar10').data.size == (378, 378)


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_the_header_of_a_config_has_paper_command_cost_and_expected_result(path):
  doc = load_module(path.stem).__doc__
  assert 'python run_' in doc and 'Cost' in doc and 'Expected' in doc and 'arXiv' in doc
