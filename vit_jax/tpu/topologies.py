"""TPU slices by their names: 'v5e:4x4' is 16 chips of v5e.

What the compiler calls a slice is what this file calls it. Rates are dense bfloat16; a clock is what the rate, the number of
matrix units and their size leave.
"""

import dataclasses
import math
import re

from jax.experimental import topologies

from vit_jax.errors import UserError, check_installed, did_you_mean

GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
  """One kind of chip. `devices`: what JAX calls devices, in a chip; v4's two cores are one ("megacore")."""

  flops: float  # FLOP/s of a chip.
  hbm: float  # GiB of a chip.
  bandwidth: float  # Bytes/s of HBM, of a chip.
  ghz: float
  devices: int
  axes: int  # Of its torus.
  host: int  # Chips of a host in a slice of several.
  shapes: tuple[str, ...]  # The slices there are, as far as people use them.


# Makers' data sheets; shapes: cloud.google.com/tpu/docs. v5e and v6e have slices of one to 256 chips.
FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = (
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
# name       FLOP/s   GiB  bytes/s  GHz   devices axes host shapes
GENERATIONS = {
  'v4':     Generation(275e12,  32,  1.23e12, 1.05, 1, 3, 4, CUBES),
  'v5e':    Generation(197e12,  16,  0.82e12, 1.5,  1, 2, 4, FLAT),
  'v5p':    Generation(459e12,  95,  2.77e12, 1.75, 1, 3, 4, CUBES),
  'v6e':    Generation(918e12,  32,  1.64e12, 1.75, 1, 2, 4, FLAT),
  'tpu7x':  Generation(2307e12, 192, 7.37e12, 2.2,  2, 3, 4, CUBES),
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
    """Of all slices."""
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """What JAX sees."""
    return self.chips * self.generation.devices

  @property
  def hosts(self) -> int:
    """Machines that feed it."""
    return max(1, math.prod(self.shape) // self.generation.host) * self.slices


def topology(name: str, slices: int = 1) -> Topology:
  """The slice that 'v5e:4x4' names. UserError that lists the right names."""
  kind, _, shape = name.partition(':')
  if kind not in GENERATIONS:
    raise UserError(
      f'--topology={name}: there is no TPU {kind!r}.{did_you_mean(kind, GENERATIONS)}'
    )
  generation = GENERATIONS[kind]
  if not re.fullmatch(rf'[1-9]\d*(x[1-9]\d*){{{generation.axes - 1}}}', shape):
    known = ', '.join(f'{kind}:{known}' for known in generation.shapes)
    raise UserError(f'--topology={name}: a slice of {kind} has {generation.axes} sides: {known}')
  if slices < 1:
    raise UserError(f'--slices={slices}: expected a number from 1')
  return Topology(name, generation, tuple(map(int, shape.split('x'))), slices)


def topology_devices(name: str, slices: int = 1) -> list:
  """The devices of TPU slices that are not here, 'v5e:4x4', to compile for. Needs libtpu; UserError where it is not installed,
  or knows no such slice."""
  config = {'chip_config_name': 'megacore'} if name.startswith('v4:') else {}
  config |= {'num_slices': slices} if slices > 1 else {}
  check_installed(f'compiling for {name}', 'plan', 'libtpu')
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **config).devices)
  except Exception as error:  # Of a plugin: it raises what it likes.
    why = ' '.join(str(error).split())[:200]
    raise UserError(f'{name}: not to be compiled for here: {why}') from None
