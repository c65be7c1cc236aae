"""Breakdowns by category: of a program written by hand, and, with libtpu, of a compiled step."""

import json
from types import SimpleNamespace

import pytest

from tests.tpu.test_plan import needs_libtpu, run_plan
from vit_jax.cli.plan import plan_to_json, print_breakdown
from vit_jax.tpu.breakdown import break_down
from vit_jax.tpu.hlo_cost import program_cost
from vit_jax.tpu.hlo_kernels import KernelSchedule
from vit_jax.tpu.plan import Plan
from vit_jax.tpu.topologies import GENERATIONS, parse_topology

BLOCK = 'jit(train_step)/shard_map/jvp(VisionTransformer)/VisionTransformer.encode/Transformer/while/body/closed_call/encoderblock'
HLO = f"""HloModule jit_train_step, is_scheduled=true

FileNames
1 "/venv/lib/python3.11/site-packages/flax/linen/linear.py"
2 "/home/me/vit_jax/models/vit.py"
3 "/home/me/vit_jax/step.py"

FunctionNames
1 "Dense.__call__"

FileLocations
1 {{file_name_id=3 function_name_id=1 line=7 end_line=7 column=1 end_column=2}}
2 {{file_name_id=2 function_name_id=1 line=88 end_line=88 column=1 end_column=2}}
3 {{file_name_id=1 function_name_id=1 line=287 end_line=287 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}
3 {{file_location_id=3 parent_frame_id=3}}

%gelu_and_product (a: bf16[4,256,128], k: bf16[128,256]) -> bf16[4,256,256] {{
  %a = bf16[4,256,128]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %k = bf16[128,256,1]{{1,0,2:T(8,128)(2,1)}} parameter(1)
  %tanh = bf16[4,256,128]{{2,1,0:T(8,128)(2,1)}} tanh(%a), metadata={{op_name="{BLOCK}/MlpBlock_3/jit(gelu)/tanh"}}
  ROOT %product = bf16[4,256,256]{{2,1,0:T(8,128)(2,1)}} convolution(%tanh, %k), window={{size=1}}, dim_labels=0bf_io0->0bf, metadata={{op_name="{BLOCK}/MlpBlock_3/Dense_1/dot_general"}}
}}

%norm (a: bf16[4,256,128]) -> bf16[4,256,128] {{
  %a = bf16[4,256,128]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %square = bf16[4,256,128]{{2,1,0:T(8,128)(2,1)}} multiply(%a, %a), metadata={{op_name="{BLOCK}/LayerNorm_0/square"}}
  ROOT %twice = bf16[4,256,128]{{2,1,0:T(8,128)(2,1)}} add(%square, %square), metadata={{op_name="{BLOCK}/LayerNorm_0/add"}}
}}

%take (stack: bf16[12,128,256], i: s32[]) -> bf16[1,128,256] {{
  %stack = bf16[12,128,256]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice = bf16[1,128,256]{{2,1,0:T(8,128)(2,1)}} dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={{1,128,256}}
}}

%body (p: (s32[], bf16[4,256,128])) -> (s32[], bf16[4,256,128]) {{
  %x = bf16[4,256,128]{{2,1,0:T(8,128)(2,1)}} get-tuple-element(%p), index=1
  %k = bf16[128,256,1]{{1,0,2:T(8,128)(2,1)S(1)}} get-tuple-element(%p), index=2
  %stack = bf16[12,128,256]{{2,1,0:T(8,128)(2,1)}} get-tuple-element(%p), index=3
  %i = s32[] get-tuple-element(%p), index=0
  %taken = bf16[1,128,256]{{2,1,0:T(8,128)(2,1)}} fusion(%stack, %i), kind=kLoop, calls=%take, metadata={{op_name="{BLOCK}/dynamic_slice"}}, backend_config={{"estimated_cycles":"50"}}
  %normed = bf16[4,256,128]{{2,1,0:T(8,128)(2,1)}} fusion(%x), kind=kLoop, calls=%norm, metadata={{op_name="{BLOCK}/add"}}, backend_config={{"estimated_cycles":"300"}}
  %mlp = bf16[4,256,256]{{2,1,0:T(8,128)(2,1)S(1)}} fusion(%normed, %k), kind=kOutput, calls=%gelu_and_product, metadata={{op_name="{BLOCK}/MlpBlock_3/Dense_1/dot_general" stack_frame_id=3}}, backend_config={{"estimated_cycles":"2000"}}
  %qkv = bf16[4,256,384]{{2,1,0:T(8,128)(2,1)}} get-tuple-element(%p), index=4
  %attention_forward.1 = bf16[4,256,128]{{2,1,0:T(8,128)(2,1)}} custom-call(%qkv), custom_call_target="tpu_custom_call", metadata={{op_name="{BLOCK}/MultiHeadDotProductAttention_1/attention_forward/pallas_call"}}
  ROOT %after = bf16[4,256,128]{{1,2,0:T(8,128)(2,1)}} copy(%attention_forward.1), backend_config={{"estimated_cycles":"40"}}
}}

%condition (p: (s32[], bf16[4,256,128])) -> pred[] {{
  ROOT %flag = pred[] parameter(0)
}}

ENTRY %main (p: bf16[4,256,128]) -> bf16[4,256,128] {{
  %p = bf16[4,256,128]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %while.1 = (s32[], bf16[4,256,128]) while(%p), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"12"}}}}
  %copy.1 = bf16[4,256,128]{{1,2,0:T(8,128)(2,1)}} copy(%p), metadata={{op_name="{BLOCK}/transpose"}}, backend_config={{"estimated_cycles":"70"}}
  %all-reduce.1 = f32[1000]{{0:T(1024)}} all-reduce(%p), channel_id=1, to_apply=%condition
  ROOT %sum = f32[] multiply(%p, %p), metadata={{op_name="jit(train_step)/cond/branch_0_fun/mul" stack_frame_id=1}}, backend_config={{"estimated_cycles":"9"}}
}}
"""
KERNELS = {'attention_forward': KernelSchedule(500, 200)}


def broken_down():
  return break_down(HLO, KERNELS, GENERATIONS['v5e'])


def operation(name: str):
  return next(each for each in broken_down().operations if each.name == name)


def test_every_instruction_has_one_category_and_loops_count_as_often_as_they_run():
  found = broken_down()
  cycles = {name: cost.cycles for name, cost in found.categories.items() if cost.cycles}
  assert cycles == {
    'projections': 12 * 2000, 'LayerNorm': 12 * 300, 'attention, forward': 12 * 500,
    'copies and layout changes': 12 * (50 + 40) + 70, 'optimizer': 9,
  }  # fmt: skip
  assert found.total.cycles == program_cost(HLO, {'attention_forward': 500}).cycles
  assert sum(found.shared.values()) == pytest.approx(found.total.cycles)


def test_a_fusion_is_that_of_its_product_and_names_what_else_it_computes():
  mlp = operation('mlp')
  assert (mlp.category, mlp.also, mlp.times) == ('projections', ('GELU',), 12)
  assert mlp.cost.flops == 12 * 2 * 4 * 256 * 128 * 256
  # At 197 TFLOP/s and 1.5 GHz; the rest is the GELU's.
  at_peak = mlp.cost.flops / 197e12 * 1.5e9
  assert mlp.shared == pytest.approx({'projections': at_peak, 'GELU': 24_000 - at_peak})
  assert broken_down().mixed == {'projections': {'GELU': 24_000}}


def test_a_collective_without_an_estimate_is_listed_with_its_bytes():
  found = operation('all-reduce.1')
  assert (found.category, found.cost.cycles) == ('collectives', 0)
  assert found.cost.hbm_bytes == 4 * 256 * 128 * 2 + 4 * 1024


def test_bytes_are_those_of_hbm_and_a_slice_is_not_the_whole_stack():
  assert operation('normed').cost.hbm_bytes == 12 * 2 * 4 * 256 * 128 * 2
  assert operation('mlp').cost.hbm_bytes == 12 * 4 * 256 * 128 * 2  # All else is in vector memory.
  assert operation('taken').cost.hbm_bytes == 12 * (2 * 128 * 256 * 2 + 4)


def test_the_kernels_limits_are_its_products_and_its_schedule():
  found = operation('attention_forward.1').cost
  assert found.flops == 12 * 2 * 2 * 4 * 256 * 256 * 128
  assert found.limits['VPU'] == 12 * 200
  stored = 4 * 256 * 128 * 2 / 4 / 1024  # Registers of 4 x 1,024 bytes.
  assert operation('after').cost.limits['VPU'] == 12 * stored


def test_the_source_is_the_innermost_line_of_this_package():
  assert operation('mlp').source == 'models/vit.py:88'
  assert operation('sum').source == 'step.py:7'
  assert operation('normed').source == ''


def test_the_tables_and_the_json_have_the_same_cycles(capsys):
  print_breakdown(broken_down())
  lines = capsys.readouterr().out.splitlines()
  total = next(line for line in lines if line.startswith('total'))
  assert total.split()[1:4] == ['0.03', '100.0', '0.03']
  first = next(line for line in lines if line.startswith('mlp'))
  assert first.split()[:3] == ['mlp', '0.02', '12']
  assert 'projections (also GELU)' in first
  known = dict.fromkeys(Plan.__dataclass_fields__, 0) | {'topology': parse_topology('v5e:2x2')}
  facts = json.loads(plan_to_json(Plan(**known), broken_down()))
  assert facts['breakdown']['cycles'] == broken_down().total.cycles
  assert facts['breakdown']['operations'][0]['source'] == 'models/vit.py:88'


def test_a_text_that_is_not_a_program_is_an_error():
  with pytest.raises(ValueError, match='no ENTRY'):
    break_down('hello', {}, GENERATIONS['v5e'])


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('unroll', [0, 1])
def test_the_parts_of_a_compiled_step_add_up_to_the_plan(tmp_path, unroll):
  """FLOPs: d x d products of a block are 12, each in both passes and once more for the weights."""
  args = [
    '--config=configs/bench.py:Ti/16',
    '--config.model.depth=2',
    f'--config.model.unroll={unroll}',
    '--config.data.size=64,64',
    '--config.data.batch=64',
    '--topology=v5e:2x2',
    '--breakdown',
  ]
  plan, _, code = run_plan(tmp_path, *args)
  parts = SimpleNamespace(**plan['breakdown'])
  assert code == 0
  assert parts.cycles == pytest.approx(plan['cycles'], rel=0.01)
  assert sum(x['cycles'] for x in parts.categories.values()) == parts.cycles
  assert sum(x['divided_cycles'] for x in parts.categories.values()) == pytest.approx(parts.cycles)
  b, n, d = 16, 17, 192
  flops = {name: cost['flops'] for name, cost in parts.categories.items()}
  assert flops['projections'] == 2 * 3 * 2 * 12 * b * n * d**2  # Two blocks.
  assert flops['patch embedding'] == 2 * 2 * b * 16 * 768 * d  # Images have no gradient.
  assert flops['attention, forward'] == 2 * 2 * 2 * b * n * n * d
  assert flops['head and loss'] == 3 * 2 * b * d * 1000
  assert parts.categories['other']['cycles'] <= 0.02 * parts.cycles
  assert len(parts.operations) == 10
  assert all(x['source'] for x in parts.operations)
