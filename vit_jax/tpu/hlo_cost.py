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
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

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
KERNEL = 'custom_call_target="tpu_custom_call"'
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
  cycles, by_name, missing = 0, collections.Counter(), []
  for each in counted_instructions(bodies, entry, missing):
    own, label = instruction_cycles(each, kernels, missing), OP_NAME.search(each.line)
    by_name[re.sub(r'\d+', '#', label[1]) if label else each.opcode] += own * each.times
    cycles += own * each.times
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


class Counted(NamedTuple):
  """An instruction that counts, and how often it runs."""

  computation: str
  name: str
  opcode: str
  line: str
  times: int


def counted_instructions(
  bodies: dict[str, list[str]],
  name: str,
  missing: list[str],
  *,
  times: int = 1,
  above: tuple[str, ...] = (),
) -> Iterator[Counted]:
  """Yield the instructions of computation `name`, which runs `times`, and of those that it calls.

  Calls and loops are followed, fusions are not. `missing` gets the loops of unknown length.
  """
  for line in bodies.get(name, ()):
    found = INSTRUCTION.match(line)
    if not found:
      continue
    instruction, opcode = found.groups()
    runs, callees = times, ()
    if opcode == 'while':
      trips = loop_trip_count(bodies, line)
      if trips is None:
        missing.append(f'{instruction}: a loop whose trip count is unknown, counted once')
      runs, callees = times * (trips or 1), (re.search(r'body=%?([\w.\-]+)', line)[1],)
    elif opcode in CALL_OPCODES and not CYCLES.search(line):
      callees = [each for each in CALLED.findall(line) if each in bodies and each not in above]
    else:
      yield Counted(name, instruction, opcode, line, times)
    for callee in callees:
      yield from counted_instructions(bodies, callee, missing, times=runs, above=(*above, name))


def instruction_cycles(each: Counted, kernels: Mapping[str, int], missing: list[str]) -> int:
  """Return the cycles of one run of an instruction.

  The compiler's estimate, or the kernel's schedule. `missing` gets kernels without one.
  """
  if KERNEL in each.line:
    kernel = find_kernel(each, kernels)
    if kernel is None:
      missing.append(f'{each.name}: a kernel without an estimate')
    return kernels.get(kernel, 0)
  match = CYCLES.search(each.line)
  return int(match[1]) if match and int(match[1]) <= UNKNOWN_CYCLES else 0


def find_kernel(each: Counted, kernels: Iterable[str]) -> str | None:
  """Return the name of the hand-written kernel that an instruction calls, among those known."""
  if KERNEL not in each.line:
    return None  # It may read the result of a kernel.
  result = each.name + each.line.partition('custom-call(')[0]
  return next((name for name in kernels if all(word in result for word in name.split())), None)


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
