"""Instructions of a compiled program, parsed from its HLO text, and where they come from."""

import collections
import dataclasses
import re

OPCODE_AND_REST = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*?)\s([\w\-]+)\((.*)')
OPERAND = re.compile(r'%([\w.\-]+)')
FUSED = re.compile(r'calls=%?([\w.\-]+)')
OP_NAME = re.compile(r'op_name="([^"]*)"')
FRAME = re.compile(r'stack_frame_id=(\d+)')
FILE = re.compile(r'(\d+) "(.*)"')
PARAMETER = re.compile(r' parameter\((\d+)\)')
FIELD = re.compile(r'(\w+)=(\d+)')
PACKAGE = 'vit_jax/'


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
  """One instruction of a computation."""

  name: str
  opcode: str
  type: str  # Of the result: 'bf16[16,197,192]{2,1,0:T(8,128)(2,1)S(1)}', or a tuple of such.
  operands: tuple[str, ...]  # Names of instructions of the same computation.
  attributes: str  # All that follows the operands.
  is_root: bool

  @property
  def fused(self) -> str | None:
    """Name of the computation of a fusion."""
    match = FUSED.search(self.attributes) if self.opcode == 'fusion' else None
    return match and match[1]

  @property
  def op_name(self) -> str:
    """Path of modules and JAX primitive; '' if the compiler made the instruction."""
    match = OP_NAME.search(self.attributes)
    return match[1] if match else ''


def parse_instruction(line: str) -> Instruction | None:
  """Return the instruction of a line, or None if it has none."""
  match = OPCODE_AND_REST.match(line)
  if not match:
    return None
  root, name, type_, opcode, rest = match.groups()
  operands, _, attributes = rest.partition(')')
  return Instruction(
    name, opcode, type_, tuple(OPERAND.findall(operands)), attributes, root is not None
  )


class Computations:
  """The computations of a program, each parsed when it is first needed."""

  def __init__(self, bodies: dict[str, list[str]]):
    self.bodies, self.parsed, self.used = bodies, {}, {}

  def __getitem__(self, name: str) -> dict[str, Instruction]:
    """Return {name: instruction} of a computation, in the order of the text."""
    if name not in self.parsed:
      found = filter(None, map(parse_instruction, self.bodies.get(name, ())))
      self.parsed[name] = {each.name: each for each in found}
    return self.parsed[name]

  def users(self, name: str, value: str) -> list[tuple[Instruction, int]]:
    """Return the instructions of a computation that use a value, each with the operand it is."""
    if name not in self.used:
      found = self.used[name] = collections.defaultdict(list)
      for user in self[name].values():
        for i, operand in enumerate(user.operands):
          found[operand].append((user, i))
    return self.used[name].get(value, [])

  def parameters(self, name: str) -> list[str]:
    """Return the parameters of a computation, in the order of the operands of its callers."""
    numbers = {}
    for line in self.bodies.get(name, ()):
      if match := PARAMETER.search(line):
        numbers[int(match[1])] = parse_instruction(line).name
    return [numbers[i] for i in sorted(numbers)]


class SourceLines:
  """The tables of an HLO text that map a stack frame to a line of Python."""

  def __init__(self, hlo: str):
    tables, table = {}, None
    for line in hlo.splitlines():
      if line and line[0].isdigit() and table is not None:
        table.append(line)
      elif line in ('FileNames', 'FileLocations', 'StackFrames'):
        table = tables.setdefault(line, [])
      elif line.startswith(('%', 'ENTRY')):
        break
      elif line:
        table = None
    numbered = lambda name: {int(x.split(maxsplit=1)[0]): x for x in tables.get(name, ())}
    self.files = {number: FILE.match(x)[2] for number, x in numbered('FileNames').items()}
    self.locations, self.frames = (
      {number: dict(FIELD.findall(x)) for number, x in numbered(name).items()}
      for name in ('FileLocations', 'StackFrames')
    )

  def find(self, instruction: Instruction) -> str:
    """Return the innermost line of this package that made an instruction: 'models/vit.py:88'.

    It is the innermost line of all if none is of this package, and '' if the line is unknown.
    """
    match, lines = FRAME.search(instruction.attributes), []
    frame = int(match[1]) if match else 0
    while frame in self.frames:
      location = self.locations[int(self.frames[frame]['file_location_id'])]
      lines.append(f'{self.files[int(location["file_name_id"])]}:{location["line"]}')
      frame = int(self.frames[frame]['parent_frame_id']) - 1  # 0 if there is no parent.
    own = next((line for line in lines if PACKAGE in line), None)
    if own:
      return own.rpartition(PACKAGE)[2]
    return lines[0].rpartition('site-packages/')[2] if lines else ''
