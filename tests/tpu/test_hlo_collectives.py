"""Bytes over the network: computed by hand for a text, and by formulas for the train step."""

import jax
import pytest

from vit_jax.cli.plan import QUIET_TPU_ENVIRONMENT
from vit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from vit_jax.config_checks import validate
from vit_jax.errors import UserError
from vit_jax.models.layers import BLOCK_PATH_PREFIX
from vit_jax.optim.param_paths import param_path
from vit_jax.tpu.hlo_collectives import collective_bytes
from vit_jax.tpu.topologies import topology_devices
from vit_jax.training.program import abstract_state, compile_train_step, make_program
from vit_jax.training.task import make_task

HLO = """HloModule jit_train_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %all-gather.7 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=4] {'x'}, frontend_attributes={chain_id="0"}
}

%fused.2 (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %all-gather.8 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=4] {'x'}, frontend_attributes={chain_id="0"}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %whole = f32[64]{0:T(512)} fusion(%p), kind=kLoop
  %other = bf16[8]{0} fusion(%p), kind=kLoop
  %fusion.1 = bf16[16,8]{1,0} fusion(%p), kind=kCustom, calls=%fused
  %fusion.2 = bf16[16,8]{1,0} fusion(%p), kind=kCustom, calls=%fused.2
  ROOT %reduce-scatter.1 = (f32[16]{0}, bf16[2]{0}) reduce-scatter(%whole, %other), channel_id=1, dimensions={0}, to_apply=%add
}

%all-reduce-scatter.1 (input: f32[30,8]) -> f32[8,8] {
  %input = f32[30,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.5 = f32[32,8]{1,0:T(8,128)} all-reduce(%pad), channel_id=24, to_apply=%add
  ROOT %slice = f32[8,8]{1,0} dynamic-slice(%all-reduce.5)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %flag = pred[] parameter(0)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4]) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %all-reduce-start.1 = (f32[10,10]{1,0}, f32[]) all-reduce-start(%p, %q), channel_id=1, to_apply=%add
  %all-reduce-done.1 = (f32[10,10]{1,0}, f32[]) all-reduce-done(%all-reduce-start.1)
  %all-gather-start.1 = ((f32[4]{0}, bf16[2]{0}), (f32[16]{0}, /*index=1*/bf16[8]{0})) all-gather-start(%p, %q), channel_id=1
  %collective-permute-start.1 = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=3
  %fusion.3 = f32[8,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %copy = f32[4]{0} copy(%p)
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_a_channel_of_several_fusions_once():
  assert collective_bytes(HLO) == {
    'all-reduce': 4 * 101,
    'all-gather': 12 * 2 * 128 + 4 * 16 + 2 * 8,
    'reduce-scatter': 12 * (4 * 64 + 2 * 8) + 4 * 30 * 8,
    'collective-permute': 4 * 4,
  }


def test_a_text_that_is_not_a_program_is_an_error():
  with pytest.raises(ValueError, match='no ENTRY'):
    collective_bytes('hello')


def small_run(
  *,
  devices=None,
  width=0,
  mlp=0,
  heads=4,
  unroll=1,
  fsdp=1,
  grad_accum_steps=1,
  grad_dtype='float32',
  **model,
):
  """Return the program of a small run over `devices`, by default the eight simulated ones."""
  config = validate(
    Config(
      data=DataConfig(batch=32, size=(8, 8)),
      model=ModelConfig(
        variant='mu/4', depth=3, width=width, mlp=mlp, heads=heads, unroll=unroll, **model
      ),
      optim=OptimConfig(name='sgd', grad_accum_steps=grad_accum_steps, grad_dtype=grad_dtype),
      mesh=MeshConfig(fsdp=fsdp),
      steps=10,
    )
  )
  return make_program(
    config, make_task(config), examples=320, classes=10, label_slots=1, devices=devices
  )


def compiled_text(**kwargs):
  """Return (text of the compiled train step, parameters) of a small run."""
  program = small_run(**kwargs)
  return compile_train_step(program).as_text(), abstract_state(program).params


def parts(params) -> tuple[int, int, int]:
  """Return numbers of elements: (all, split over 'fsdp' in blocks, split elsewhere)."""
  count = lambda keep: sum(
    leaf.size for keys, leaf in jax.tree.leaves_with_path(params) if keep(param_path(keys), leaf)
  )
  split = lambda leaf: 'fsdp' in leaf.sharding.spec
  inside = lambda path: path.startswith(BLOCK_PATH_PREFIX)
  return (
    count(lambda path, leaf: True),
    count(lambda path, leaf: split(leaf) and inside(path)),
    count(lambda path, leaf: split(leaf) and not inside(path)),
  )


def norms(params) -> int:
  """Return the bytes of the squared norms that devices sum for gradients that are split."""
  return 4 * sum('fsdp' in leaf.sharding.spec for leaf in jax.tree.leaves(params))


SCALARS = 4 + 4 + 4  # The loss, and the batch's examples and skipped examples.


@pytest.mark.parametrize('unroll', [0, 1])
@pytest.mark.parametrize('grad_accum_steps', [1, 2])
def test_data_parallel_is_one_all_reduce_of_the_gradients(unroll, grad_accum_steps):
  hlo, params = compiled_text(unroll=unroll, grad_accum_steps=grad_accum_steps)
  assert collective_bytes(hlo) == {'all-reduce': 4 * parts(params)[0] + SCALARS}


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
@pytest.mark.parametrize('fsdp', [4, 8])
def test_fsdp_gathers_parameters_twice_and_sums_their_gradients_once(fsdp, remat):
  """On a CPU each device gets the full sum of the gradients, and slices its shard."""
  hlo, params = compiled_text(width=256, mlp=512, fsdp=fsdp, remat=remat)
  everything, blocks, others = parts(params)
  assert blocks > 0.9 * everything
  shares = (blocks + others) // fsdp if fsdp < 8 else 0  # Summed once more, over the axis data.
  assert collective_bytes(hlo) == {
    # Blocks are gathered in the forward pass and again in the backward pass.
    'all-gather': 4 * (2 * blocks + others),
    'all-reduce': 4 * (everything + shares) + norms(params) + SCALARS,
  }


def slice_of_tpus(monkeypatch, topology: str = 'v5e:2x2') -> list:
  """Return chips to compile for. Skip the test if their compiler is not installed."""
  for name, value in QUIET_TPU_ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  try:
    return topology_devices(topology)
  except UserError as error:
    pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize('unroll', [0, 1])
@pytest.mark.parametrize(('grad_dtype', 'size'), [('float32', 4), ('bfloat16', 2)])
def test_a_tpus_program_sums_gradients_once_in_that_dtype(monkeypatch, unroll, grad_dtype, size):
  devices = slice_of_tpus(monkeypatch)
  hlo, params = compiled_text(
    devices=devices, width=256, unroll=unroll, dtype='bfloat16', grad_dtype=grad_dtype
  )
  assert collective_bytes(hlo) == {'all-reduce': size * parts(params)[0] + SCALARS}


def needed_by_fsdp(params, steps: float = 1) -> dict[str, float]:
  """Return the bytes that FSDP needs.

  Parameters are gathered twice in bfloat16. Their gradients are reduce-scattered once, which takes
  `steps` times their bytes.
  """
  everything, blocks, others = parts(params)
  return {
    'all-gather': 2 * (2 * blocks + others),
    'reduce-scatter': 4 * (blocks + others) * steps,
    'all-reduce': 4 * (everything - blocks - others) + norms(params) + SCALARS,
  }


@pytest.mark.slow
@pytest.mark.parametrize('unroll', [0, 1])
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_tpus_program_gathers_and_scatters_what_fsdp_needs(monkeypatch, unroll, remat):
  devices = slice_of_tpus(monkeypatch)
  hlo, params = compiled_text(
    devices=devices, width=1024, mlp=4096, fsdp=4, unroll=unroll, remat=remat, dtype='bfloat16'
  )
  found = collective_bytes(hlo)
  # Padding a side of a shard to a multiple of 32 moves a few rows.
  assert found.pop('collective-permute', 0) < 0.01 * sum(found.values())
  assert found == needed_by_fsdp(params)


@pytest.mark.slow
@pytest.mark.parametrize(('width', 'heads'), [(768, 12), (1024, 16), (1280, 16)])
@pytest.mark.parametrize(
  ('topology', 'fsdp', 'steps'), [('v5e:2x2', 4, 1), ('v5e:4x4', 16, 1 + 1 / 4)]
)
def test_a_tpus_program_scatters_sums_at_the_widths_of_b_l_and_h(
  monkeypatch, width, heads, topology, fsdp, steps
):
  """Slices of eight and more chips sum in two steps. The second has the result of the first."""
  devices = slice_of_tpus(monkeypatch, topology)
  sizes = {'width': width, 'mlp': 4 * width, 'heads': heads}
  hlo, params = compiled_text(devices=devices, **sizes, fsdp=fsdp, dtype='bfloat16')
  found = collective_bytes(hlo)
  assert found.pop('collective-permute', 0) < 0.01 * sum(found.values())
  assert found == needed_by_fsdp(params, steps)
