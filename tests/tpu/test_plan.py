"""The text and the remedies of a plan.

If libtpu is installed, real programs are compiled for slices that this machine does not have.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.tpu.tpu_cycles import independent_cycles
from vit_jax.config import Config, DataConfig, LoraConfig, ModelConfig, OptimConfig
from vit_jax.config_checks import validate
from vit_jax.settings.fields import with_settings
from vit_jax.tpu.plan import (
  Plan,
  compare_lora,
  compare_plans,
  format_plan,
  memory_remedies,
  parse_out_of_memory,
)
from vit_jax.tpu.topologies import GIB, parse_topology
from vit_jax.training.program import make_program
from vit_jax.training.task import make_task

ROOT = Path(__file__).parents[2]
LIBTPU = importlib.util.find_spec('libtpu') is not None
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason="no libtpu: pip install '.[plan]'")


def made(**changes) -> Plan:
  """Return a plan of round numbers: 1.5 M cycles are 1 ms on v5e."""
  known = {
    'topology': parse_topology('v5e:2x2'), 'fits': True, 'hbm': 8 * GIB, 'memory': {'parameters': 1 * GIB}, 'parameters': 10, 'trained': 10, 'lora': {},
    'flops': 0.5 * 4 * 197e12 * 1e-3, 'steps': 3600, 'batch': 100, 'cycles': 1_500_000, 'missing': (),
    'collectives': {'all-reduce': 4e6}, 'compile_seconds': 1.0,
  }  # fmt: skip
  return Plan(**known | changes)


def test_cycles_become_seconds_by_the_clock_and_mfu_by_the_peak():
  assert made().seconds_per_step == pytest.approx(1e-3)
  assert made().mfu == pytest.approx(0.5)


def test_the_text_of_a_plan_marks_estimates():
  text = '\n'.join(format_plan(validate(Config(steps=1)), made()))
  assert '8.00 of 16 GiB: it fits; parameters 1.00' in text
  assert '1.0 ms (estimate); MFU 50 % (estimate)' in text
  assert '100,000 /s (estimate)' in text
  # 3.6 s on four chips at 50 % of 197 TFLOP/s; a TPUv3 core has 61.5 TFLOP/s.
  assert '0.0 hours, 0 chip-hours, 0 TPUv3-core-days' in text
  assert 'all-reduce of 4.0 MB a step over ICI' in text


def test_the_text_of_a_plan_states_what_lora_saves():
  saved = {'parameters': (21 * 2**20, 20 * 2**20), 'optimizer': (2**20, 40 * 2**20)}
  text = '\n'.join(format_plan(validate(Config(steps=1)), made(trained=1, lora=saved)))
  assert 'parameters  10, 1 (10 %) trained' in text
  assert 'LoRA        optimizer 1.0 MiB of a device, 40.0 without' in text


def test_the_text_of_a_plan_counts_the_parameters_of_a_teacher():
  text = '\n'.join(format_plan(validate(Config(steps=1)), made(teacher=1234)))
  assert 'parameters  10, and 1,234 of the teacher' in text


def test_lora_saves_gradients_and_moments_of_frozen_parameters():
  """One device, AdamW: two moments and a gradient of 4 bytes for each trained parameter."""
  config = Config(
    data=DataConfig(train='builtin:digits', batch=8, size=(8, 8)),
    model=ModelConfig(variant='mu/4', depth=2, width=32, mlp=64, heads=4),
    lora=LoraConfig(rank=2),
    init='base',
    steps=1,
  )
  config = validate(config)
  program = make_program(
    config, make_task(config), examples=64, classes=10, label_slots=1, devices=jax.devices()[:1]
  )
  adapters = 2 * 2 * (32 * 2 + 2 * 32)  # Two blocks, query and value.
  head = 32 * 10 + 10
  block = 4 * (32 * 32 + 32) + 32 * 64 + 64 + 64 * 32 + 32 + 4 * 32
  base = 2 * block + 4 * 4 * 3 * 32 + 32 + 32 + 5 * 32 + 2 * 32 + head
  compared = compare_lora(program, 64)
  assert compared['parameters'] == (4 * (base + adapters), 4 * base)
  assert compared['gradients'] == (4 * (adapters + head), 4 * base)
  assert compared['optimizer'] == (8 * (adapters + head) + 4, 8 * base + 4)  # And a count.


def test_plans_are_compared_side_by_side_with_a_dash_for_unknown_numbers():
  table = compare_plans({'one': made(), 'two': made(fits=False, cycles=None)})
  assert ('ms a step', '1.0', '-') in table
  assert ('fits', 'yes', 'no') in table


def test_remat_is_tried_before_accumulation_and_accumulation_before_fsdp():
  config = validate(Config(data=DataConfig(batch=64), steps=1))
  tried = memory_remedies(config, parse_topology('v5e:4x4'))
  assert tried[:6] == [
    {'model.remat': 'vit'}, {'model.remat': 'dots'}, {'model.remat': 'full'},
    {'optim.grad_accum_steps': 2}, {'optim.grad_accum_steps': 4}, {'mesh.fsdp': 8},
  ]  # fmt: skip
  assert tried[-1] == {'model.remat': 'full', 'optim.grad_accum_steps': 4, 'mesh.fsdp': 16}
  for settings in tried:
    validate(with_settings(config, settings))


def test_settings_that_are_already_set_are_not_tried():
  config = validate(
    Config(data=DataConfig(batch=16), optim=OptimConfig(grad_accum_steps=1), steps=1)
  )
  config = with_settings(config, {'model.remat': 'full', 'mesh.fsdp': 16})
  assert memory_remedies(config, parse_topology('v5e:4x4')) == []


def test_fsdp_stays_within_a_slice_and_no_setting_is_tried_twice():
  config = validate(Config(data=DataConfig(batch=64), steps=1))
  for where in (parse_topology('v5e:2x4'), parse_topology('v5e:2x4', 2)):
    tried = memory_remedies(config, where)
    assert max(settings.get('mesh.fsdp', 0) for settings in tried) == 8
    assert len({str(settings) for settings in tried}) == len(tried)


def run_plan(tmp_path: Path, *args: str) -> tuple[dict, str, int]:
  """Run the command, and return (plan, program, exit code)."""
  files = ['--json', str(tmp_path / 'plan.json'), '--hlo', str(tmp_path / 'hlo.txt')]
  command = [sys.executable, '-m', 'vit_jax', 'plan', *args, *files]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False
  )
  assert done.returncode in (0, 1), done.stderr[-2000:]
  return (
    json.loads((tmp_path / 'plan.json').read_text(encoding='utf-8')),
    (tmp_path / 'hlo.txt').read_text(encoding='utf-8'),
    done.returncode,
  )


@needs_libtpu
@pytest.mark.slow
def test_the_cost_of_a_compiled_step_is_that_of_an_independent_script(tmp_path):
  args = [
    '--config=configs/bench.py:Ti/16',
    '--config.model.depth=2',
    '--config.data.batch=64',
    '--topology=v5e:2x2',
  ]
  plan, hlo, code = run_plan(tmp_path, *args)
  assert code == 0
  assert plan['missing'] == []
  theirs = independent_cycles(
    hlo, topology='v5e:2x2', b=16, n=197, d=192, heads=3, dtype='bfloat16', directory=tmp_path
  )
  assert plan['cycles'] == pytest.approx(theirs, rel=0.01)


# (variant, batch, upper limit in million cycles, upper limit in bytes).
BENCH = [('B/16', 512, 206, 8.2e9), ('S/16', 1024, 176, 7.7e9), ('L/16', 128, 150, 7.9e9)]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(('variant', 'batch', 'cycles', 'bytes_'), BENCH)
def test_the_step_is_as_fast_and_as_small_as_promised(tmp_path, variant, batch, cycles, bytes_):
  plan, _, code = run_plan(
    tmp_path,
    f'--config=configs/bench.py:{variant}',
    f'--config.data.batch={batch}',
    '--topology=v5e:2x2',
  )
  assert code == 0
  assert plan['cycles'] <= cycles * 1e6
  assert plan['hbm'] <= bytes_


# Recipes, each on the slice for which it is meant.
RECIPES = [
  ('pretrain.py:B/16,imagenet21k', 4096, 'v5e:4x4'),
  ('pretrain.py:L/16,imagenet21k', 4096, 'v5e:16x16'),
  ('pretrain.py:H/14,jft', 4096, 'v5e:16x16'),
  ('scaling.py:G/14', 16_384, 'v5p:8x8x8'),
]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(('config', 'batch', 'topology'), RECIPES)
def test_the_papers_recipes_fit_their_slices_and_keep_them_busy(tmp_path, config, batch, topology):
  plan, _, code = run_plan(tmp_path, f'--config=configs/{config}', f'--topology={topology}')
  assert (plan['fits'], code, plan['batch'], plan['missing']) == (True, 0, batch, [])
  assert plan['mfu'] >= 0.5


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_long_images_gain_from_the_kernel(tmp_path):
  args = [
    '--config=configs/bench.py:B/16',
    '--config.model.depth=2',
    '--config.data.size=384,384',
    '--config.data.batch=128',
  ]
  kernel, _, _ = run_plan(tmp_path, *args, '--topology=v5e:2x2')
  xla, _, _ = run_plan(tmp_path, *args, '--config.model.attention=xla', '--topology=v5e:2x2')
  assert xla['cycles'] >= 1.5 * kernel['cycles']


@pytest.mark.parametrize(
  'message',
  [
    'Ran out of memory in memory space hbm. Used 41.50G of 15.75G hbm. Exceeded hbm capacity by '
    '25.75G.',
    'the total memory required for HLO temporaries (41.50G) exceeds available HBM (15.75G). HLO '
    'module: jit_train_step.',
  ],
)
def test_running_out_of_memory_is_distinguished_from_other_compiler_errors(message):
  assert parse_out_of_memory(RuntimeError(message))['hbm'] == 41.5 * GIB
  with pytest.raises(RuntimeError, match='another thing'):
    parse_out_of_memory(RuntimeError('another thing'))
