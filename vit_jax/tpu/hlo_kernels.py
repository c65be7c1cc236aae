"""Cycles of the hand-written kernels on a TPU that this machine does not have.

A kernel has no estimate in the program that calls it. So it is compiled once more alone, and its
cost is read from the schedule that the compiler dumps: VLIW bundles of a grid step, one a cycle,
times the number of grid steps. Waiting for memory is not included. The compiler reads the option
that dumps the schedule only at start-up: hence a separate process.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

KERNEL_NAME = re.compile(
  'attention_(forward|backward)'
)  # Differentiation adds to the name: jvp_attention_forward_.1.
BUNDLES = re.compile(r'total scheduled bundles:\s+(\d+)')
# Arithmetic, moves between lanes, transcendental functions, loads and stores.
VECTOR_UNITS = ('VALU', 'XLU', 'EUP', 'VLOAD', 'VSTORE')
GRID_STEPS = re.compile(r'loop: start=0, step=1, limit=(\d+)')


@dataclasses.dataclass(frozen=True, slots=True)
class KernelSchedule:
  """Cycles of one call of a kernel, and how many of them its busiest vector unit needs."""

  cycles: int
  vector_cycles: int


def kernel_schedules(
  topology: str, *, b: int, n: int, d: int, heads: int, dtype: str, rope: bool = False
) -> dict[str, KernelSchedule]:
  """Return the schedules of 'attention_forward' and 'attention_backward'.

  They are for b images of n tokens of width d, on one chip of the slice, with rotary positions or
  without.
  """
  wanted = {'topology': topology, 'b': b, 'n': n, 'd': d, 'heads': heads, 'dtype': dtype}
  wanted['rope'] = rope
  with tempfile.TemporaryDirectory() as dump:
    flags = (
      f'--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true '
      f'{os.environ.get("LIBTPU_INIT_ARGS", "")}'
    )
    command = [sys.executable, '-m', __name__, json.dumps(wanted)]
    done = subprocess.run(
      command,
      env=os.environ | {'LIBTPU_INIT_ARGS': flags},
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      raise RuntimeError(
        f'{" ".join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}'
      )
    return read_schedules(Path(dump))


def read_schedules(dump: Path) -> dict[str, KernelSchedule]:
  """Return {kernel: schedule} from the reports of the compiler in a folder."""
  found = {}
  for path in sorted(dump.glob('*-schedule-analysis_final_bundles.txt')):
    number, call = re.match(r'(\d+)-(.+?)-\d+-', path.name).groups()
    source = next(dump.glob(f'{number}-{call}-*-original.txt'), None)
    if source and (kernel := KERNEL_NAME.search(call)):
      loop = GRID_STEPS.search(source.read_text(encoding='utf-8'))
      grid_steps = int(loop[1]) if loop else 1
      bundles = int(BUNDLES.search(path.read_text(encoding='utf-8'))[1])
      usage = next(
        dump.glob(f'{number}-{call}-*-final_hlo-static-per-bundle-utilization.txt'), None
      )
      vector = vector_bundles(usage.read_text(encoding='utf-8')) if usage else 0
      found[kernel[0]] = KernelSchedule(bundles * grid_steps, vector * grid_steps)
  return found


def vector_bundles(usage: str) -> int:
  """Return the fewest bundles into which the operations of the busiest vector unit would fit.

  `usage` is a report of the compiler: names of units, their operations in a bundle, then those that
  each bundle has.
  """
  lines = [line for line in usage.splitlines() if line.strip() and not line.startswith('==')]
  names, (capacity, *used) = lines[0].split(', '), [list(map(int, x.split())) for x in lines[1:]]
  needed = {
    name: math.ceil(sum(column) / most)
    for name, most, column in zip(names, capacity, zip(*used, strict=True), strict=True)
  }
  return max(needed.get(name, 0) for name in VECTOR_UNITS)


def compile_kernels(wanted: dict):
  """Compile the attention of one layer, forward and backward, for the first device of the slice."""
  import jax
  import numpy as np
  from jax.sharding import SingleDeviceSharding

  from vit_jax.kernels.attention import fused_attention
  from vit_jax.tpu.topologies import topology_devices

  sharding = SingleDeviceSharding(topology_devices(wanted['topology'])[0])
  shaped = lambda *shape: jax.ShapeDtypeStruct(shape, wanted['dtype'], sharding=sharding)
  b, n, d = (wanted[name] for name in 'bnd')

  heads = wanted['heads']
  rotation = np.zeros((3, n, d // heads), np.float32) if wanted['rope'] else None

  def both(x, bias, do):
    attention = lambda x, bias: fused_attention(x, bias, heads, rotation=rotation)
    out, back = jax.vjp(attention, x, bias)
    return out, back(do)

  jax.jit(both).lower(shaped(b, n, 3 * d), shaped(3 * d), shaped(b, n, d)).compile()


if __name__ == '__main__':
  compile_kernels(json.loads(sys.argv[1]))
