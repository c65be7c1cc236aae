"""TPU slices by the names that JAX's compiler uses: 'v5e:4x4' is 16 chips of v5e.

FLOP/s are dense bfloat16. The clock rate follows from them and from number and size of the matrix
units.
"""

import dataclasses
import math
import re

from vit_jax.errors import UserError, check_installed, did_you_mean

GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
  """One kind of chip.

  `devices` is the number of JAX devices in a chip: the two cores of v4 are one ("megacore").
  """

  flops: float  # FLOP/s of a chip.
  hbm: float  # GiB of a chip.
  bandwidth: float  # Bytes/s of HBM, of a chip.
  ghz: float
  devices: int
  axes: int  # Axes of the torus of chips.
  host: int  # Chips of a host, in slices of several hosts.
  cores: int  # TensorCores of a chip: each has a vector unit.
  # Register operations of a vector unit in a cycle: arithmetic, transcendental functions, loads,
  # stores.
  vector_slots: tuple[int, int, int, int]
  shapes: tuple[str, ...]  # The common slices.


# Makers' data sheets; vector slots: reports of libtpu 0.0.52 on a kernel's schedule; shapes:
# cloud.google.com/tpu/docs. v5e and v6e have slices of one to 256 chips.
TORUS_2D_SHAPES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
TORUS_3D_SHAPES = (
  '2x2x1',
  '2x2x2',
  '2x2x4',
  '2x4x4',
  '4x4x4',
  '4x4x8',
  '4x8x8',
  '8x8x8',
  '8x8x16',
  '8x16x16',
  '16x16x16',
)
# name       FLOP/s   GiB  bytes/s  GHz   devices axes host cores vector slots shapes
GENERATIONS = {
  'v4':     Generation(275e12,  32,  1.23e12, 1.05, 1, 3, 4, 2, (2, 1, 1, 1), TORUS_3D_SHAPES),
  'v5e':    Generation(197e12,  16,  0.82e12, 1.5,  1, 2, 4, 1, (4, 1, 3, 1), TORUS_2D_SHAPES),
  'v5p':    Generation(459e12,  95,  2.77e12, 1.75, 1, 3, 4, 2, (4, 1, 3, 1), TORUS_3D_SHAPES),
  'v6e':    Generation(918e12,  32,  1.64e12, 1.75, 1, 2, 4, 1, (4, 1, 3, 2), TORUS_2D_SHAPES),
  'tpu7x':  Generation(2307e12, 192, 7.37e12, 2.2,  2, 3, 4, 2, (4, 1, 3, 2), TORUS_3D_SHAPES),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
  """One or several equal slices."""

  name: str
  generation: Generation
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    """Number of chips of all slices."""
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """Number of JAX devices of all slices."""
    return self.chips * self.generation.devices

  @property
  def hosts(self) -> int:
    """Number of host machines of all slices."""
    return max(1, math.prod(self.shape) // self.generation.host) * self.slices


def parse_topology(name: str, slices: int = 1) -> Topology:
  """Return the slice that 'v5e:4x4' names. Raises UserError with the known names."""
  kind, _, shape = name.partition(':')
  if kind not in GENERATIONS:
    raise UserError(f'--topology={name}: unknown TPU {kind!r}.{did_you_mean(kind, GENERATIONS)}')
  generation = GENERATIONS[kind]
  if not re.fullmatch(rf'[1-9]\d*(x[1-9]\d*){{{generation.axes - 1}}}', shape):
    known = ', '.join(f'{kind}:{known}' for known in generation.shapes)
    raise UserError(f'--topology={name}: a slice of {kind} has {generation.axes} sides: {known}')
  if slices < 1:
    raise UserError(f'--slices={slices}: expected a number from 1')
  return Topology(name, generation, tuple(map(int, shape.split('x'))), slices)


def topology_devices(name: str, slices: int = 1) -> list:
  """Return the devices of TPU slices that this machine does not have, to compile for: 'v5e:4x4'.

  Raises UserError if libtpu is not installed or does not know the slice.
  """
  config = {'chip_config_name': 'megacore'} if name.startswith('v4:') else {}
  config |= {'num_slices': slices} if slices > 1 else {}
  check_installed(f'compiling for {name}', 'plan', 'libtpu')
  from jax.experimental import topologies  # Slow to import, and not needed for --help.

  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **config).devices)
  except Exception as error:  # A plugin raises all kinds of errors.
    why = ' '.join(str(error).split())[:200]
    raise UserError(f'{name}: the compiler does not know this topology: {why}') from None
