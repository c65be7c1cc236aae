"""Cycles of our hand-written kernels on a TPU that is not here.

A kernel carries no estimate in the program that calls it, so it is compiled once more by itself, and its cost read from the
schedule that the compiler then writes down: bundles of a turn of its grid, one a cycle, times the turns. Waiting for
memory is not in that. The compiler takes the wish for a schedule only when it starts: hence a process of its own.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = re.compile(
  'attention_(forward|backward)'
)  # Whatever differentiation makes of it: jvp_attention_forward_.1.
BUNDLES = re.compile(r'total scheduled bundles:\s+(\d+)')
TURNS = re.compile(r'loop: start=0, step=1, limit=(\d+)')


def kernel_cycles(
  topology: str, *, b: int, n: int, d: int, heads: int, dtype: str
) -> dict[str, int]:
  """{'attention_forward': …, 'attention_backward': …} for b images of n tokens of width d, on one chip of the slice."""
  wanted = {'topology': topology, 'b': b, 'n': n, 'd': d, 'heads': heads, 'dtype': dtype}
  with tempfile.TemporaryDirectory() as dump:
    flags = f'--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true {os.environ.get("LIBTPU_INIT_ARGS", "")}'
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
    return scheduled(Path(dump))


def scheduled(dump: Path) -> dict[str, int]:
  """{kernel: cycles} from the schedules in a folder."""
  cycles = {}
  for path in sorted(dump.glob('*-schedule-analysis_final_bundles.txt')):
    number, call = re.match(r'(\d+)-(.+?)-\d+-', path.name).groups()
    source = next(dump.glob(f'{number}-{call}-*-original.txt'), None)
    if source and (kernel := NAME.search(call)):
      turns = TURNS.search(source.read_text())
      cycles[kernel[0]] = int(BUNDLES.search(path.read_text())[1]) * (int(turns[1]) if turns else 1)
  return cycles


def compile_kernels(wanted: dict):
  """Compiles the attention of one layer, forward and backward, for the first device of the slice."""
  import jax
  from jax.sharding import SingleDeviceSharding

  from vit_jax.kernels.attention import fused_attention
  from vit_jax.tpu.topologies import topology_devices

  sharding = SingleDeviceSharding(topology_devices(wanted['topology'])[0])
  shaped = lambda *shape: jax.ShapeDtypeStruct(shape, wanted['dtype'], sharding=sharding)
  b, n, d = (wanted[name] for name in 'bnd')

  def both(x, bias, do):
    out, back = jax.vjp(lambda x, bias: fused_attention(x, bias, wanted['heads']), x, bias)
    return out, back(do)

  jax.jit(both).lower(shaped(b, n, 3 * d), shaped(3 * d), shaped(b, n, d)).compile()


if __name__ == '__main__':
  compile_kernels(json.loads(sys.argv[1]))
