"""Estimated cycles of a program compiled for a TPU.

The compiler's own estimates in its HLO text, added up.

Every fusion, convolution and copy has `estimated_cycles`; hand-written kernels do not
(`hlo_kernels.py` computes theirs). A loop body counts as often as it runs. Instructions inside a
fusion do not count, since the fusion does. These are estimates: not all waiting for memory and for
other chips is included.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-<>]+) .*\{\s*$')
INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = .*?\s([\w\-]+)\(')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CALLEES = (
  'calls|to_apply|called_computations|branch_computations|true_computation|false_computation'
)
CALLED = re.compile(rf'(?:{CALLEES})=\{{?%?([\w.\-]+)')
LOOP_LIMIT = re.compile(r's32\[\]\S* constant\((\d+)\)')
OP_NAME = re.compile(r'op_name="([^"]*)"')
UNKNOWN_CYCLES = 10**13  # The compiler writes more where it does not know.
CALL_OPCODES = ('call', 'conditional', 'async-start')


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramCost:
  """Cycles of a program, in total and by operation name, and what could not be counted."""

  cycles: int
  by_name: collections.Counter
  missing: tuple[str, ...]


def program_cost(hlo: str, kernels: Mapping[str, int] = MappingProxyType({})) -> ProgramCost:
  """Return the cost of a program from `compiled.as_text()`.

  `kernels` has the cycles of one call of each hand-written kernel by name. A name may be followed
  by a part of the shape of the result. Raises ValueError if there is no entry computation.
  """
  bodies, entry = parse_computations(hlo)
  if entry is None:
    raise ValueError('the text has no ENTRY computation: it is not HLO')
  by_name, missing = collections.Counter(), []
  cycles = add_computation_cost(
    bodies, entry, CostTally(by_name, missing, kernels), times=1, above=()
  )
  return ProgramCost(cycles, by_name, tuple(missing))


def parse_computations(hlo: str) -> tuple[dict[str, list[str]], str | None]:
  """Return ({computation: its lines}, the name of the entry computation)."""
  bodies, name, entry = {}, None, None
  for line in hlo.splitlines():
    if not line.startswith(' ') and (head := COMPUTATION.match(line)):
      name = head[2]
      bodies[name] = []
      entry = name if head[1] else entry
    elif line.startswith('}'):
      name = None
    elif name:
      bodies[name].append(line)
  return bodies, entry


@dataclasses.dataclass(frozen=True, slots=True)
class CostTally:
  """Costs accumulated while a program is traversed, and the known costs of kernels."""

  by_name: collections.Counter
  missing: list[str]
  kernels: Mapping[str, int]


def add_computation_cost(
  bodies: dict[str, list[str]], name: str, tally: CostTally, *, times: int, above: tuple[str, ...]
) -> int:
  """Return the cycles of one run of computation `name`.

  The cycles of all its `times` runs are added to the tally by operation name.
  """
  cycles = 0
  for line in bodies.get(name, ()):
    found = INSTRUCTION.match(line)
    if not found:
      continue
    instruction, kind = found.groups()
    if kind == 'while':
      trips = loop_trip_count(bodies, line)
      if trips is None:
        tally.missing.append(f'{instruction}: a loop whose trip count is unknown, counted once')
      body, trips = re.search(r'body=%?([\w.\-]+)', line)[1], trips or 1
      cycles += trips * add_computation_cost(
        bodies, body, tally, times=times * trips, above=(*above, name)
      )
    elif kind in CALL_OPCODES and not CYCLES.search(line):
      for callee in (
        called for called in CALLED.findall(line) if called in bodies and called not in above
      ):
        cycles += add_computation_cost(bodies, callee, tally, times=times, above=(*above, name))
    else:
      own, label = instruction_cycles(line, instruction, tally), OP_NAME.search(line)
      tally.by_name[re.sub(r'\d+', '#', label[1]) if label else kind] += own * times
      cycles += own
  return cycles


def instruction_cycles(line: str, instruction: str, tally: CostTally) -> int:
  """Return the cycles of an instruction without callees.

  The compiler's estimate, or the kernel's schedule.
  """
  if 'custom_call_target="tpu_custom_call"' in line:
    result = instruction + line.partition('custom-call(')[0]
    names = (name for name in tally.kernels if all(word in result for word in name.split()))
    kernel = next(names, None)
    if kernel is None:
      tally.missing.append(f'{instruction}: a kernel without an estimate')
    return tally.kernels.get(kernel, 0)
  match = CYCLES.search(line)
  return int(match[1]) if match and int(match[1]) <= UNKNOWN_CYCLES else 0


def loop_trip_count(bodies: dict[str, list[str]], line: str) -> int | None:
  """Return how often the loop of a `while` runs, or None if it is unknown.

  The compiler states it, or it is the constant that a scan counts up to.
  """
  if match := TRIP_COUNT.search(line):
    return int(match[1])
  condition = bodies.get(re.search(r'condition=%?([\w.\-]+)', line)[1], ())
  limits = [int(match[1]) for text in condition if (match := LOOP_LIMIT.search(text))]
  return (
    limits[0] if len(limits) == 1 and any('direction=LT' in text for text in condition) else None
  )
