"""TPU slices by the accelerator types under which the cloud sells them.

'v5litepod-256' is 'v5e:16x16'.
"""

import dataclasses
import math

from vit_jax.errors import UserError, did_you_mean
from vit_jax.tpu.topologies import GENERATIONS, Topology, parse_topology


@dataclasses.dataclass(frozen=True, slots=True)
class AcceleratorKind:
  """The terms on which the cloud offers one TPU generation."""

  prefix: str  # First part of the accelerator type.
  unit: int  # What its number counts: 1 for chips, 2 for cores.
  image: str  # Image of its virtual machines; '' if there are none outside GKE.
  host: int  # Largest number of chips in a slice that is one virtual machine.
  flags: tuple[str, ...]  # For LIBTPU_INIT_ARGS.


# Names: cloud.google.com/tpu/docs and xpk's system_characteristics.py. Images: levanter's
# infra/launch.py. Flags: axlearn's compiler_options.py, maxtext's xla_flags_library.py and
# levanter's TPU guide; libtpu 0.0.52 accepts them all.
SCHEDULER_FLAG = '--xla_tpu_enable_latency_hiding_scheduler=true'
ASYNC_COLLECTIVE_FLAGS = (
  '--xla_enable_async_all_gather=true',
  '--xla_enable_async_collective_permute=true',
)
COLLECTIVE_FUSION_FLAGS = (
  '--xla_tpu_enable_async_collective_fusion=true',
  '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
  '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
  '--xla_tpu_overlap_compute_collective_tc=true',
)
MULTISLICE_FLAGS = (
  '--xla_tpu_enable_data_parallel_all_reduce_opt=true',
  '--xla_tpu_data_parallel_opt_different_sized_ops=true',
)
OVERLAP_FLAGS = (SCHEDULER_FLAG, *ASYNC_COLLECTIVE_FLAGS)


def fusion_flags(vmem_kib: int) -> tuple[str, ...]:
  """Return the flags that overlap collectives with fused computation, with a limit of VMEM."""
  vmem = f'--xla_tpu_scoped_vmem_limit_kib={vmem_kib}'
  return (SCHEDULER_FLAG, *COLLECTIVE_FUSION_FLAGS, vmem)


# generation              prefix   unit image             host flags
ACCELERATOR_KINDS = {
  'v4':    AcceleratorKind('v4',        2, 'tpu-ubuntu2204-base', 4, OVERLAP_FLAGS),
  'v5e':   AcceleratorKind('v5litepod', 1, 'v2-alpha-tpuv5-lite', 8, (SCHEDULER_FLAG,)),
  'v5p':   AcceleratorKind('v5p',       2, 'v2-alpha-tpuv5',      4, OVERLAP_FLAGS),
  'v6e':   AcceleratorKind('v6e',       1, 'v2-alpha-tpuv6e',     8, fusion_flags(98304)),
  'tpu7x': AcceleratorKind('tpu7x',     2, '',                    4, fusion_flags(65536)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Accelerator:
  """One or several equal slices, as they are ordered."""

  name: str  # 'v5litepod-256'.
  kind: AcceleratorKind
  topology: Topology

  @property
  def hosts(self) -> int:
    """Virtual machines of a slice. GKE, which has one for every four chips, is not covered."""
    chips = math.prod(self.topology.shape)
    return 1 if chips <= self.kind.host else self.topology.hosts // self.topology.slices

  @property
  def libtpu_args(self) -> str:
    """Default value of LIBTPU_INIT_ARGS."""
    return ' '.join(self.kind.flags + (MULTISLICE_FLAGS if self.topology.slices > 1 else ()))


def parse_accelerator(name: str, slices: int = 1) -> Accelerator:
  """Return the slices that 'v5litepod-256', or 'v5e:16x16', names.

  Raises UserError with the known names.
  """
  if ':' in name:
    where = parse_topology(name, slices)
    return Accelerator(
      accelerator_type(where), ACCELERATOR_KINDS[where.name.partition(':')[0]], where
    )
  known = accelerator_names()
  if name not in known:
    prefix = name.rpartition('-')[0]
    same = [each for each in known if each.startswith(f'{prefix}-')]
    raise UserError(
      f'--tpu={name} is unknown.'
      + (f' Known: {", ".join(same)}.' if same else did_you_mean(name, known))
    )
  where = parse_topology(known[name], slices)
  return Accelerator(name, ACCELERATOR_KINDS[where.name.partition(':')[0]], where)


def accelerator_names() -> dict[str, str]:
  """Return {'v5litepod-256': 'v5e:16x16', …} for the common slices."""
  listed = [
    parse_topology(f'{generation}:{shape}')
    for generation in ACCELERATOR_KINDS
    for shape in GENERATIONS[generation].shapes
  ]
  return {accelerator_type(each): each.name for each in listed}


def accelerator_type(where: Topology) -> str:
  """Return the accelerator type of a topology: 'v5e:16x16' -> 'v5litepod-256'."""
  kind = ACCELERATOR_KINDS[where.name.partition(':')[0]]
  return f'{kind.prefix}-{math.prod(where.shape) * kind.unit}'
