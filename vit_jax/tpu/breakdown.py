"""Breakdown of a compiled step by category: cycles, FLOPs, bytes, and the unit that is the limit.

An instruction belongs to one category with all its cycles: that of its largest matrix product, or
else of most of its vector operations; if it only moves data, to the copies. The compiler fuses the
neighbours of a matrix product into it, so `also` names what else an instruction computes, and
`shared` divides its cycles: the matrix product gets those of its limit, and all vector operations
share the rest in proportion.

The limits are lower bounds: the cycles for which one unit would be busy at its peak.
"""

import collections
import dataclasses
from collections.abc import Mapping

from vit_jax.tpu.hlo_categories import (
  CATEGORIES,
  COLLECTIVES,
  COPIES,
  OTHER,
  categorize,
)
from vit_jax.tpu.hlo_collectives import COLLECTIVE_KINDS
from vit_jax.tpu.hlo_cost import (
  Counted,
  counted_instructions,
  find_kernel,
  instruction_cycles,
  parse_computations,
)
from vit_jax.tpu.hlo_instructions import (
  Computations,
  Instruction,
  SourceLines,
  parse_instruction,
)
from vit_jax.tpu.hlo_kernels import KernelSchedule
from vit_jax.tpu.hlo_work import Part, Work, instruction_work
from vit_jax.tpu.topologies import Generation

LANES = 1024  # Elements of a vector register: 8 x 128 of 4 bytes.
TRANSCENDENTAL_WEIGHT = 3  # Beside the 1 of any operation: one unit computes them, of four.
MIN_SHARE = 0.1  # Of the vector work, from which on a category is named in `also`.
UNITS = ('MXU', 'VPU', 'HBM')


@dataclasses.dataclass(slots=True)
class Cost:
  """Cycles and work of instructions, summed over their runs; bytes are those of one device."""

  cycles: int = 0
  flops: float = 0  # Of matrix products.
  vector_ops: float = 0
  hbm_bytes: float = 0
  limits: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))

  @property
  def bound(self) -> str:
    """The unit with the largest limit; '' if nothing is computed or moved."""
    unit = max(self.limits, key=self.limits.get)
    return unit if self.limits[unit] else ''

  def add(self, other: 'Cost', times: int = 1):
    """Add `times` runs of another cost."""
    for name in ('cycles', 'flops', 'vector_ops', 'hbm_bytes'):
      setattr(self, name, getattr(self, name) + times * getattr(other, name))
    for unit in UNITS:
      self.limits[unit] += times * other.limits[unit]


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
  """One instruction of the program, with the cost of all its runs."""

  name: str
  category: str
  also: tuple[str, ...]  # Categories of other work in the same fusion.
  shared: dict[str, float]  # Its cycles, divided over the categories of its work.
  times: int
  source: str
  op_name: str
  cost: Cost


@dataclasses.dataclass(frozen=True, slots=True)
class Breakdown:
  """Cost by category, and of every operation, the most expensive first."""

  categories: dict[str, Cost]
  operations: list[Operation]
  shared: dict[str, float]  # Cycles by category, where a fusion divides its own over its work.
  mixed: dict[str, dict[str, int]]  # {category: {category in its fusions: cycles of these}}.

  @property
  def total(self) -> Cost:
    """The sum over the categories."""
    total = Cost()
    for cost in self.categories.values():
      total.add(cost)
    return total


def break_down(
  hlo: str, kernels: Mapping[str, KernelSchedule], generation: Generation
) -> Breakdown:
  """Return the breakdown of a program from `compiled.as_text()`.

  `kernels` has the schedules of the hand-written kernels, as for `program_cost`. Raises ValueError
  if there is no entry computation.
  """
  bodies, entry = parse_computations(hlo)
  if entry is None:
    raise ValueError('the text has no ENTRY computation: it is not HLO')
  computations, sources = Computations(bodies), SourceLines(hlo)
  operations = []
  for each in counted_instructions(bodies, entry, []):
    instruction = parse_instruction(each.line)
    work = instruction_work(computations, each.computation, instruction)
    cost, parts = Cost(), work.parts
    cost.add(single_cost(each, work, kernels, generation), each.times)
    if not cost.cycles and not cost.bound:
      continue
    category, weights = assign(instruction, parts)
    source = sources.find(instruction)
    operations.append(
      Operation(
        each.name,
        category,
        others(category, weights),
        divide(cost, category, weights),
        each.times,
        source,
        instruction.op_name,
        cost,
      )
    )
  operations.sort(key=lambda operation: -operation.cost.cycles)
  return sum_operations(operations)


def sum_operations(operations: list[Operation]) -> Breakdown:
  """Return the breakdown of all operations of a program."""
  categories = {name: Cost() for name in CATEGORIES}
  shared, mixed = collections.Counter(), collections.defaultdict(collections.Counter)
  for operation in operations:
    shared.update(operation.shared)
    categories[operation.category].add(operation.cost)
    for other in operation.also:
      mixed[operation.category][other] += operation.cost.cycles
  mixed = {name: dict(found) for name, found in mixed.items()}
  return Breakdown(categories, operations, dict(shared), mixed)


def single_cost(
  each: Counted, work: Work, kernels: Mapping[str, KernelSchedule], generation: Generation
) -> Cost:
  """Return the cost of one run of an instruction."""
  cycles = instruction_cycles(each, {name: made.cycles for name, made in kernels.items()}, [])
  limits = unit_limits(work, generation)
  if kernel := find_kernel(each, kernels):
    limits |= {'VPU': kernels[kernel].vector_cycles}
  return Cost(cycles, work.flops, work.vector_ops, work.hbm_bytes, limits)


def unit_limits(work: Work, generation: Generation) -> dict[str, float]:
  """Return the cycles that each unit of a device needs for the work at its peak."""
  g, devices = generation, generation.devices
  registers = LANES * g.cores / devices
  register_bytes = 4 * registers
  arithmetic, transcendental, loads, stores = g.vector_slots
  vector = (
    work.vector_ops / (arithmetic * registers),
    work.transcendental / (transcendental * registers),
    (work.moved_bytes - work.stored_bytes) / (loads * register_bytes),
    work.stored_bytes / (stores * register_bytes),
  )
  return {
    'MXU': work.flops / (g.flops / devices / g.ghz / 1e9),
    'VPU': max(vector),
    'HBM': work.hbm_bytes / (g.bandwidth / devices / g.ghz / 1e9),
  }


def assign(
  instruction: Instruction, parts: tuple[Part, ...]
) -> tuple[str, collections.Counter[str]]:
  """Return (category, vector work by category) of an instruction."""
  names = (instruction.opcode, instruction.name, instruction.fused or '')
  if any(name.startswith(COLLECTIVE_KINDS) for name in names):
    return COLLECTIVES, collections.Counter()
  own = categorize(instruction.op_name)
  weights = collections.Counter()
  for part in parts:
    work = part.vector_ops + TRANSCENDENTAL_WEIGHT * part.transcendental
    weights[categorize(part.op_name) or own or OTHER] += work
  products = [part for part in parts if part.flops]
  if products:
    largest = max(products, key=lambda part: part.flops)
    return categorize(largest.op_name) or own or OTHER, weights
  return weights.most_common(1)[0][0] if weights.total() else COPIES, weights


def others(category: str, weights: collections.Counter[str]) -> tuple[str, ...]:
  """Return the other categories that have a part of the vector work, the largest first."""
  least = max(1, MIN_SHARE * weights.total())
  return tuple(name for name, count in weights.most_common() if count >= least and name != category)


def divide(cost: Cost, category: str, weights: collections.Counter[str]) -> dict[str, float]:
  """Divide the cycles of an operation over the categories of its work."""
  own = min(cost.cycles, cost.limits['MXU']) if weights.total() else cost.cycles
  shared = collections.Counter({category: own})
  for name, weight in weights.items():
    if weight:
      shared[name] += (cost.cycles - own) * weight / weights.total()
  return dict(shared)
