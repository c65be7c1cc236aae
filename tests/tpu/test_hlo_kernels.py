"""The compilers of real TPUs accept the attention kernel. The tests need libtpu."""

import pytest

from vit_jax.cli.plan import QUIET_TPU_ENVIRONMENT
from vit_jax.errors import UserError
from vit_jax.kernels.attention import is_supported
from vit_jax.tpu.hlo_kernels import kernel_schedules, vector_bundles
from vit_jax.tpu.topologies import topology_devices

# Tokens, width and heads: B/16, L/16, H/14, g/14 and G/14 at 224 px; B/16 and L/16 at 384; channels
# of a head 72, 96 and 128; L/14 at 518.
SHAPES = [
  (197, 768, 12), (197, 1024, 16), (257, 1280, 16), (257, 1408, 16), (257, 1664, 16),
  (577, 768, 12), (577, 1024, 16), (197, 1152, 16), (50, 384, 4), (50, 384, 3), (1370, 1024, 16),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_every_generation_compiles_the_kernel_for_every_supported_shape(topology, monkeypatch):
  for name, value in QUIET_TPU_ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  try:
    chip = topology_devices(topology)[0].device_kind
  except UserError as error:
    pytest.skip(str(error))
  fitting = [shape for shape in SHAPES if is_supported(*shape, chip)]
  assert len(fitting) >= (8 if chip == 'TPU v4' else len(SHAPES))
  for n, d, heads in fitting:
    made = kernel_schedules(topology, b=2, n=n, d=d, heads=heads, dtype='bfloat16')
    cycles = [made[f'attention_{way}'].cycles for way in ('forward', 'backward')]
    assert 0 < cycles[0] < cycles[1], (n, d, heads)


def test_a_kernel_needs_as_many_bundles_as_its_busiest_vector_unit():
  report = """== CAPACTIY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
4 0 0 4 0 0 0 0 0 0 2
0 0 3 4 0 1 0 0 0 0 0
0 0 0 1 0 1 0 0 0 0 0
0 0 0 0 0 0 3 0 1 0 0
"""
  assert vector_bundles(report) == 3  # Nine arithmetic operations, four at a time.
