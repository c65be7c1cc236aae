"""Slices by the names that the cloud sells them under: 'v5litepod-256' is 'v5e:16x16'."""

import dataclasses
import math

from vit_jax.errors import UserError, did_you_mean
from vit_jax.tpu.topologies import GENERATIONS, Topology, topology


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
  """How one generation is sold."""

  prefix: str  # Of the accelerator type.
  unit: int  # What its number counts, of a chip: 1 chip, or its 2 cores.
  image: str  # What its virtual machines boot; '' where there are none outside GKE.
  host: int  # Chips of a slice that is one virtual machine, at most.
  flags: tuple[str, ...]  # For LIBTPU_INIT_ARGS.


# Names: cloud.google.com/tpu/docs and xpk's system_characteristics.py. Images: levanter's infra/launch.py.
# Flags: axlearn's compiler_options.py, maxtext's xla_flags_library.py and levanter's TPU guide; libtpu 0.0.52 knows them all.
SCHEDULE = '--xla_tpu_enable_latency_hiding_scheduler=true'
ASYNC = ('--xla_enable_async_all_gather=true', '--xla_enable_async_collective_permute=true')
FUSION = (
  '--xla_tpu_enable_async_collective_fusion=true',
  '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
  '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
  '--xla_tpu_overlap_compute_collective_tc=true',
)
SLICES = (
  '--xla_tpu_enable_data_parallel_all_reduce_opt=true',
  '--xla_tpu_data_parallel_opt_different_sized_ops=true',
)
# generation     prefix    unit image                host flags
KINDS = {
  'v4':    Kind('v4',        2, 'tpu-ubuntu2204-base', 4, (SCHEDULE, *ASYNC)),
  'v5e':   Kind('v5litepod', 1, 'v2-alpha-tpuv5-lite', 8, (SCHEDULE,)),
  'v5p':   Kind('v5p',       2, 'v2-alpha-tpuv5',      4, (SCHEDULE, *ASYNC)),
  'v6e':   Kind('v6e',       1, 'v2-alpha-tpuv6e',     8, (SCHEDULE, *FUSION, '--xla_tpu_scoped_vmem_limit_kib=98304')),
  'tpu7x': Kind('tpu7x',     2, '',                    4, (SCHEDULE, *FUSION, '--xla_tpu_scoped_vmem_limit_kib=65536')),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Accelerator:
  """One or several equal slices, as they are ordered."""

  name: str  # 'v5litepod-256'.
  kind: Kind
  topology: Topology

  @property
  def hosts(self) -> int:
    """Virtual machines of a slice, outside GKE, which gives every four chips one."""
    chips = math.prod(self.topology.shape)
    return 1 if chips <= self.kind.host else self.topology.hosts // self.topology.slices

  @property
  def libtpu_args(self) -> str:
    """What LIBTPU_INIT_ARGS is set to, where nobody says otherwise."""
    return ' '.join(self.kind.flags + (SLICES if self.topology.slices > 1 else ()))


def accelerator(name: str, slices: int = 1) -> Accelerator:
  """The slices that 'v5litepod-256', or 'v5e:16x16', names. UserError with the right names."""
  if ':' in name:
    where = topology(name, slices)
    return Accelerator(sold_as(where), KINDS[where.name.partition(':')[0]], where)
  known = names()
  if name not in known:
    prefix = name.rpartition('-')[0]
    same = [each for each in known if each.startswith(f'{prefix}-')]
    raise UserError(
      f'--tpu={name}: no such slice.'
      + (f' Known: {", ".join(same)}.' if same else did_you_mean(name, known))
    )
  where = topology(known[name], slices)
  return Accelerator(name, KINDS[where.name.partition(':')[0]], where)


def names() -> dict[str, str]:
  """{'v5litepod-256': 'v5e:16x16', …}: those that people use."""
  listed = [
    topology(f'{generation}:{shape}')
    for generation in KINDS
    for shape in GENERATIONS[generation].shapes
  ]
  return {sold_as(each): each.name for each in listed}


def sold_as(where: Topology) -> str:
  """'v5e:16x16' -> 'v5litepod-256'."""
  kind = KINDS[where.name.partition(':')[0]]
  return f'{kind.prefix}-{math.prod(where.shape) * kind.unit}'
