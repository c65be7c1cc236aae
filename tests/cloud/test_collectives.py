"""Bytes over the network: by hand on a text, and against closed forms on the compiled train step."""

import pytest

from vit_jax.cloud.collectives import collective_bytes

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

%condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %flag = pred[] parameter(0)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4]) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %all-reduce-start.1 = (f32[10,10]{1,0}, f32[]) all-reduce-start(%p, %q), channel_id=1, to_apply=%add
  %all-reduce-done.1 = (f32[10,10]{1,0}, f32[]) all-reduce-done(%all-reduce-start.1)
  %all-gather-start.1 = ((f32[4]{0}, bf16[2]{0}), (f32[16]{0}, /*index=1*/bf16[8]{0})) all-gather-start(%p, %q), channel_id=1
  %collective-permute-start.1 = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=3
  ROOT %copy = f32[4]{0} copy(%p)
}
"""  # noqa: E501


def test_loops_count_as_they_run_and_what_several_fusions_work_at_counts_once():
  assert collective_bytes(HLO) == {
    'all-reduce': 4 * 101,
    'all-gather': 12 * 2 * 128 + 4 * 16 + 2 * 8,
    'reduce-scatter': 12 * (4 * 64 + 2 * 8),
    'collective-permute': 4 * 4,
  }


def test_a_text_that_is_no_program_is_an_error():
  with pytest.raises(ValueError, match='no ENTRY'):
    collective_bytes('hello')
