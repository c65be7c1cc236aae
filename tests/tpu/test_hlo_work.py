"""Work of single instructions: FLOPs against a convolution of ones, bytes by hand."""

import jax
import jax.numpy as jnp
import pytest

from vit_jax.tpu.hlo_arrays import parse_arrays
from vit_jax.tpu.hlo_cost import parse_computations
from vit_jax.tpu.hlo_instructions import Computations
from vit_jax.tpu.hlo_work import instruction_work

# (left, right, stride, padding, dilation of the left side, of the right side); [b, 0, f] and [0, i, o].
CONVOLUTIONS = [
  ((4, 7, 6), (1, 6, 5), 1, (0, 0), 1, 1),
  ((4, 7, 6), (7, 6, 5), 1, (0, 0), 1, 1),
  ((2, 9, 3), (3, 3, 5), 2, (1, 1), 1, 1),
  ((2, 5, 3), (5, 3, 4), 4, (0, 0), 5, 1),
  ((2, 9, 3), (3, 3, 4), 1, (2, 2), 1, 2),
]


@pytest.mark.parametrize('case', CONVOLUTIONS)
def test_flops_are_two_for_each_product_of_a_convolution_of_ones(case):
  left, right, stride, pad, left_dilation, right_dilation = case
  ones = jax.lax.conv_general_dilated(
    jnp.ones(left), jnp.ones(right), (stride,), [pad], lhs_dilation=(left_dilation,),
    rhs_dilation=(right_dilation,), dimension_numbers=('NHC', 'HIO', 'NHC'),
  )  # fmt: skip
  sides = lambda shape: ','.join(map(str, shape))
  window = f'size={right[0]} stride={stride} pad={pad[0]}_{pad[1]} lhs_dilate={left_dilation} rhs_dilate={right_dilation}'
  text = f"""ENTRY %main () -> f32[] {{
  %l = f32[{sides(left)}] parameter(0)
  %r = f32[{sides(right)}] parameter(1)
  ROOT %c = f32[{sides(ones.shape)}] convolution(%l, %r), window={{{window}}}, dim_labels=b0f_0io->b0f
}}"""
  assert work(text, 'c').flops == 2 * float(ones.sum())


def work(text: str, name: str):
  """Return the work of an instruction of the entry computation."""
  bodies, entry = parse_computations(text)
  computations = Computations(bodies)
  return instruction_work(computations, entry, computations[entry][name])


def test_a_dot_has_two_flops_for_each_pair_that_it_contracts():
  text = """ENTRY %main () -> f32[] {
  %l = f32[3,4,5]{2,1,0} parameter(0)
  %r = f32[3,5,6]{2,1,0} parameter(1)
  ROOT %d = f32[3,4,6]{2,1,0} dot(%l, %r), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
}"""
  assert work(text, 'd').flops == 2 * 3 * 4 * 6 * 5


def test_an_update_in_place_writes_the_update_only():
  text = """%update (s: f32[12,128], u: f32[1,128], i: s32[]) -> f32[12,128] {
  %s = f32[12,128]{1,0:T(1,128)} parameter(0)
  %u = f32[1,128]{1,0:T(1,128)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %put = f32[12,128]{1,0:T(1,128)} dynamic-update-slice(%s, %u, %i, %i)
}

ENTRY %main () -> f32[] {
  %stack = f32[12,128]{1,0:T(1,128)} parameter(0)
  %new = f32[1,128]{1,0:T(1,128)} parameter(1)
  %at = s32[]{:T(128)S(1)} parameter(2)
  ROOT %f = f32[12,128]{1,0:T(1,128)} fusion(%stack, %new, %at), kind=kLoop, calls=%update
}"""
  assert work(text, 'f').hbm_bytes == 2 * 128 * 4


def test_a_copy_into_vector_memory_reads_hbm_once():
  text = """ENTRY %main () -> f32[] {
  %a = f32[256,128]{1,0:T(8,128)} parameter(0)
  ROOT %c = (f32[256,128]{1,0:T(8,128)S(1)}, f32[256,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
}"""
  assert work(text, 'c').hbm_bytes == 256 * 128 * 4


def test_an_allocation_moves_nothing():
  text = """ENTRY %main () -> f32[] {
  ROOT %a = f32[12,256,128]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
}"""
  assert work(text, 'a').hbm_bytes == work(text, 'a').moved_bytes == 0


def test_arrays_are_padded_to_their_tiles_in_the_order_of_their_layout():
  (rows, columns, vector, scalar) = parse_arrays(
    '(bf16[16,197,192]{2,1,0:T(8,128)(2,1)}, bf16[16,197,192]{1,2,0:T(8,128)(2,1)S(1)}, /*index=2*/f32[197]{0:T(256)}, pred[]{:T(512)})'
  )
  assert rows.bytes == 16 * 200 * 256 * 2
  assert columns.bytes == 16 * 192 * 256 * 2
  assert vector.bytes == 256 * 4
  assert scalar.bytes == 1
  assert [array.in_hbm for array in (rows, columns)] == [True, False]
