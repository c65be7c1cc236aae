"""Cycles of compiled programs: loops, calls and unknown costs.

An independent script computes the same sum, if it is present.
"""

import collections

import pytest

from tests.tpu.tpu_cycles import independent_script
from vit_jax.tpu.hlo_cost import program_cost

HLO = """HloModule jit_train_step, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %inside = f32[4]{0} add(%p, %p), backend_config={"estimated_cycles":"999999"}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.1 = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="block_7/mlp"}, backend_config={"estimated_cycles":"100"}
  ROOT %copy.2 = f32[4]{0} copy(%fusion.1), backend_config={"estimated_cycles":"11"}
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %compare = pred[] compare(%p, %limit), direction=LT
}

%forever (p: (s32[], f32[4])) -> pred[] {
  ROOT %flag = pred[] parameter(0)
}

%called (p: f32[4]) -> f32[4] {
  ROOT %dot.1 = f32[4]{0} convolution(%p, %p), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4]) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %while.2 = (s32[], f32[4]) while(%p), condition=%condition, body=%body
  %while.3 = (s32[], f32[4]) while(%p), condition=%forever, body=%body
  %call.1 = f32[4]{0} call(%p), to_apply=%called
  %kernel.1 = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  %unknown = f32[4]{0} copy(%p), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %fusion.9 = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="block_8/mlp"}, backend_config={"estimated_cycles":"7"}
}
"""


def test_a_loops_body_counts_as_often_as_it_runs_and_a_fusion_once():
  found = program_cost(HLO)
  assert found.cycles == 12 * 111 + 5 * 111 + 1 * 111 + 1000 + 7
  assert +found.by_name == {'block_#/mlp': 18 * 100 + 7, 'copy': 18 * 11, 'convolution': 1000}
  assert [line.partition(':')[0] for line in found.missing] == ['while.3', 'kernel.1']


def test_a_kernel_has_the_cycles_of_its_schedule_if_that_is_known():
  found = program_cost(HLO, {'kernel': 50})
  assert found.cycles == program_cost(HLO).cycles + 50
  assert not any('kernel' in line for line in found.missing)


def test_kernels_of_one_name_differ_by_the_shape_of_their_results():
  found = program_cost(HLO, {'kernel f32[8]': 70, 'kernel f32[4]': 50})
  assert found.cycles == program_cost(HLO).cycles + 50
  assert any('kernel' in line for line in program_cost(HLO, {'kernel f32[8]': 70}).missing)


def test_the_sum_is_that_of_an_independent_script():
  script = independent_script()
  bodies, entry = script.computations(HLO)
  by, missing = collections.Counter(), []
  assert script.total(bodies, entry, None, by, missing) == program_cost(HLO).cycles
  assert by == +program_cost(HLO).by_name


def test_a_text_that_is_not_a_program_is_an_error():
  with pytest.raises(ValueError, match='no ENTRY'):
    program_cost('hello')
