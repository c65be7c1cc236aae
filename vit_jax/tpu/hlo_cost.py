"""What a program compiled for a TPU should cost: the compiler's own estimates in its HLO text, added up.

Every fusion, convolution and copy carries `estimated_cycles`; hand-written kernels don't (kernels.py says what they cost). A
loop's body counts as often as it runs; what is inside a fusion not at all, since the fusion counts. Estimates, not times:
waiting for memory and for other chips is not all in them.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-<>]+) .*\{\s*$')
INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = .*?\s([\w\-]+)\(')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CALLEES = (
  'calls|to_apply|called_computations|branch_computations|true_computation|false_computation'
)
CALLED = re.compile(rf'(?:{CALLEES})=\{{?%?([\w.\-]+)')
LIMIT = re.compile(r's32\[\]\S* constant\((\d+)\)')
OP_NAME = re.compile(r'op_name="([^"]*)"')
UNKNOWN = 10**13  # What the compiler writes where it does not know.
CALLS = ('call', 'conditional', 'async-start')


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
  """Cycles of one run; where they go, by the operation's name; and what could not be counted."""

  cycles: int
  by_name: collections.Counter
  missing: tuple[str, ...]


def cost(hlo: str, kernels: Mapping[str, int] = MappingProxyType({})) -> Cost:
  """Of a program, from `compiled.as_text()`, where a call of a hand-written kernel costs what `kernels` says: {name: cycles}.

  ValueError where there is no entry computation.
  """
  bodies, entry = computations(hlo)
  if entry is None:
    raise ValueError('the text has no ENTRY computation: it is no HLO')
  by_name, missing = collections.Counter(), []
  cycles = add_up(bodies, entry, Tally(by_name, missing, kernels), times=1, above=())
  return Cost(cycles, by_name, tuple(missing))


def computations(hlo: str) -> tuple[dict[str, list[str]], str | None]:
  """({name: its lines}, the name of the entry)."""
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
class Tally:
  """What is found on the way through a program, and what is known before."""

  by_name: collections.Counter
  missing: list[str]
  kernels: Mapping[str, int]


def add_up(
  bodies: dict[str, list[str]], name: str, tally: Tally, *, times: int, above: tuple[str, ...]
) -> int:
  """Cycles of one run of computation `name`, which runs `times` in all; itemised on the way."""
  cycles = 0
  for line in bodies.get(name, ()):
    found = INSTRUCTION.match(line)
    if not found:
      continue
    instruction, kind = found.groups()
    if kind == 'while':
      trips = trip_count(bodies, line)
      if trips is None:
        tally.missing.append(
          f'{instruction}: a loop that does not say how often it runs, counted once'
        )
      body, trips = re.search(r'body=%?([\w.\-]+)', line)[1], trips or 1
      cycles += trips * add_up(bodies, body, tally, times=times * trips, above=(*above, name))
    elif kind in CALLS and not CYCLES.search(line):
      for callee in (
        called for called in CALLED.findall(line) if called in bodies and called not in above
      ):
        cycles += add_up(bodies, callee, tally, times=times, above=(*above, name))
    else:
      own, label = own_cycles(line, instruction, tally), OP_NAME.search(line)
      tally.by_name[re.sub(r'\d+', '#', label[1]) if label else kind] += own * times
      cycles += own
  return cycles


def own_cycles(line: str, instruction: str, tally: Tally) -> int:
  """Of one instruction that calls nothing: the compiler's estimate, or the kernel's schedule."""
  if 'custom_call_target="tpu_custom_call"' in line:
    kernel = next((name for name in tally.kernels if name in instruction), None)
    if kernel is None:
      tally.missing.append(f'{instruction}: a kernel, which carries no estimate')
    return tally.kernels.get(kernel, 0)
  match = CYCLES.search(line)
  return int(match[1]) if match and int(match[1]) <= UNKNOWN else 0


def trip_count(bodies: dict[str, list[str]], line: str) -> int | None:
  """How often the loop of a `while` runs: what the compiler says, or the constant that a scan counts up to; None otherwise."""
  if match := TRIPS.search(line):
    return int(match[1])
  condition = bodies.get(re.search(r'condition=%?([\w.\-]+)', line)[1], ())
  limits = [int(match[1]) for text in condition if (match := LIMIT.search(text))]
  return (
    limits[0] if len(limits) == 1 and any('direction=LT' in text for text in condition) else None
  )
