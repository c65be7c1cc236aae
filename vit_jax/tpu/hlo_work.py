"""Work of an instruction: FLOPs of its matrix products, vector operations, and bytes of HBM.

A fusion does the work of all instructions in it. It reads only the slices of an operand that it
uses, and writes only the update of an array that it updates in place.
"""

import dataclasses
import math
import re

from vit_jax.tpu.hlo_arrays import count_elements, count_padded, parse_arrays
from vit_jax.tpu.hlo_cost import KERNEL
from vit_jax.tpu.hlo_instructions import Computations, Instruction

# Opcodes that do no arithmetic. All others are an operation for each element.
MOVES = frozenset({
  'bitcast', 'bitcast-convert', 'broadcast', 'concatenate', 'constant', 'convert', 'copy',
  'copy-done', 'copy-start', 'custom-call', 'dynamic-slice', 'dynamic-update-slice', 'fusion',
  'gather', 'get-tuple-element', 'iota', 'pad', 'parameter', 'reduce-precision', 'reshape',
  'reverse', 'slice', 'slice-done', 'slice-start', 'transpose', 'tuple',
})  # fmt: skip
FREE = frozenset({
  'bitcast', 'conditional', 'constant', 'copy-done', 'get-tuple-element', 'parameter',
  'slice-done', 'tuple', 'while',
})  # fmt: skip
# One a cycle and register goes to the unit for transcendental functions.
TRANSCENDENTAL = frozenset({
  'cosine', 'divide', 'erf', 'exponential', 'exponential-minus-one', 'log', 'log-plus-one',
  'logistic', 'power', 'rsqrt', 'sine', 'sqrt', 'tan', 'tanh',
})  # fmt: skip
SLICES = ('dynamic-slice', 'gather', 'slice')
ALIASES = ('bitcast', 'convert', 'copy', 'reshape', 'transpose')  # Of a result in place.
MATRIX_PRODUCTS = ('convolution', 'dot')
ATTENTION_PRODUCTS = {'attention_forward': 2, 'attention_backward': 5}
LABELS = re.compile(r'dim_labels=(\w+)_(\w+)->(\w+)')
WINDOW = re.compile(r'window=\{([^}]*)\}')
CONTRACTED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
  """An instruction inside a fusion, or the instruction itself, with its own arithmetic."""

  op_name: str
  flops: float  # Of a matrix product.
  vector_ops: float
  transcendental: float


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
  """All work of one run of an instruction."""

  parts: tuple[Part, ...]
  hbm_bytes: float
  moved_bytes: float  # Read or written, in any memory.
  stored_bytes: float  # Written, in any memory.

  @property
  def flops(self) -> float:
    """FLOPs of matrix products."""
    return sum(part.flops for part in self.parts)

  @property
  def vector_ops(self) -> float:
    """Operations on elements and on the padding of registers, transcendental ones included."""
    return sum(part.vector_ops for part in self.parts)

  @property
  def transcendental(self) -> float:
    """Operations that only the unit for transcendental functions can do."""
    return sum(part.transcendental for part in self.parts)


def instruction_work(computations: Computations, name: str, instruction: Instruction) -> Work:
  """Return the work of an instruction of computation `name`."""
  if instruction.opcode in FREE or is_allocation(instruction):
    return Work((), 0, 0, 0)
  if instruction.opcode in ('copy-start', 'slice-start'):
    return copied_ahead(instruction)
  inside = computations[name]
  read = [
    (inside[operand].type, read_elements(computations, name, instruction, i))
    for i, operand in enumerate(instruction.operands)
    if operand in inside
  ]
  types = [*read, (instruction.type, written_elements(computations, name, instruction))]
  moved = [share_of_bytes(*each) for each in types]
  return Work(
    tuple(collect_parts(computations, name, instruction)),
    hbm_bytes=sum(hbm for hbm, _ in moved),
    moved_bytes=sum(both for _, both in moved),
    stored_bytes=moved[-1][1],
  )


def is_allocation(instruction: Instruction) -> bool:
  """Return whether a custom call is no kernel: the compiler's own ones only name memory."""
  return instruction.opcode == 'custom-call' and KERNEL not in instruction.attributes


def copied_ahead(instruction: Instruction) -> Work:
  """Return the work of a copy that runs beside other instructions, from its (to, from, …)."""
  arrays = [array for array in parse_arrays(instruction.type) if array.sides]
  size = min((array.bytes for array in arrays), default=0)
  return Work((), size * sum(array.in_hbm for array in arrays[:2]), 0, 0)


def share_of_bytes(type_: str, elements: float) -> tuple[float, float]:
  """Return the bytes (of HBM, of all memories) of `elements` elements of a type."""
  arrays = parse_arrays(type_)
  share = min(1, elements / max(1, sum(array.elements for array in arrays)))
  every = [(array.bytes * share, array.in_hbm) for array in arrays]
  return sum(size for size, in_hbm in every if in_hbm), sum(size for size, _ in every)


def read_elements(computations: Computations, name: str, user: Instruction, operand: int) -> float:
  """Return how many elements of an operand `user`, an instruction of computation `name`, reads."""
  source = user.operands[operand]
  full = count_elements(computations[name][source].type)
  if user.opcode in SLICES and operand == 0:
    return count_elements(user.type)
  if user.opcode == 'dynamic-update-slice' and operand == 0:
    return 0  # In place.
  if not user.fused:
    return full
  parameters = computations.parameters(user.fused)
  if operand >= len(parameters):
    return full
  return min(full, value_reads(computations, user.fused, parameters[operand]))


def value_reads(computations: Computations, name: str, value: str) -> float:
  """Return how many elements of a value the instructions of a fused computation read."""
  total = 0
  for user, operand in computations.users(name, value):
    if user.opcode == 'bitcast':
      total += value_reads(computations, name, user.name)
    else:
      total += read_elements(computations, name, user, operand)
  return total


def written_elements(computations: Computations, name: str, instruction: Instruction) -> float:
  """Return how many elements of its result an instruction writes."""
  if instruction.fused:
    root = next(each for each in computations[instruction.fused].values() if each.is_root)
    return root_writes(computations, instruction.fused, root)
  if instruction.opcode == 'dynamic-update-slice':
    return count_elements(computations[name][instruction.operands[1]].type)
  return count_elements(instruction.type)


def root_writes(computations: Computations, name: str, value: Instruction) -> float:
  """Return how many elements a fused computation writes for its result `value`."""
  inside = computations[name]
  if value.opcode == 'tuple':
    return sum(root_writes(computations, name, inside[operand]) for operand in value.operands)
  if value.opcode in ALIASES:
    return root_writes(computations, name, inside[value.operands[0]])
  return written_elements(computations, name, value)


def collect_parts(computations: Computations, name: str, instruction: Instruction) -> list[Part]:
  """Return the arithmetic of an instruction, or of those in a fusion, without moves of data."""
  if instruction.fused:
    inside = computations[instruction.fused].values()
    return [
      part for each in inside for part in collect_parts(computations, instruction.fused, each)
    ]
  inside, op_name = computations[name], instruction.op_name
  if KERNEL in instruction.attributes:
    return [Part(op_name, kernel_flops(inside, instruction), 0, 0)]
  if instruction.opcode in MATRIX_PRODUCTS:
    return [Part(op_name, product_flops(inside, instruction), 0, 0)]
  if instruction.opcode in MOVES or instruction.opcode in FREE:
    return []
  elements = count_padded(instruction.type)
  if instruction.opcode in ('reduce', 'reduce-window') and instruction.operands[0] in inside:
    elements = max(elements, count_padded(inside[instruction.operands[0]].type))
  special = elements if instruction.opcode in TRANSCENDENTAL else 0
  return [Part(op_name, 0, elements, special)]


def product_flops(inside: dict[str, Instruction], product: Instruction) -> float:
  """Return the FLOPs of a convolution or dot: two for each multiply-add."""
  (left,), (out,) = (parse_arrays(inside[product.operands[0]].type), parse_arrays(product.type))
  labels = LABELS.search(product.attributes)
  if not labels:
    axes = filter(None, CONTRACTED.search(product.attributes)[1].split(','))
    return 2 * out.elements * math.prod(left.sides[int(axis)] for axis in axes)
  (right,) = parse_arrays(inside[product.operands[1]].type)
  of_left, of_right, of_out = (
    dict(zip(names, array.sides, strict=True))
    for names, array in zip(labels.groups(), (left, right, out), strict=True)
  )
  pairs = 1
  for i, window in enumerate(parse_window(product.attributes, len(out.sides) - 2)):
    pairs *= window_pairs(of_left[str(i)], of_right[str(i)], of_out[str(i)], **window)
  return 2 * of_out['b'] * of_out['f'] * of_right['i'] * pairs


def parse_window(attributes: str, axes: int) -> list[dict[str, int]]:
  """Return stride, first padding and dilations of each axis of a convolution's window."""
  match = WINDOW.search(attributes)
  fields = dict(field.split('=') for field in match[1].split()) if match else {}
  numbers = lambda name, default: [
    int(x.split('_')[0]) for x in fields[name].split('x')
  ] if name in fields else [default] * axes  # fmt: skip
  columns = [numbers('stride', 1), numbers('pad', 0), numbers('lhs_dilate', 1)]
  rows = zip(*columns, numbers('rhs_dilate', 1), strict=True)
  names = ('stride', 'pad', 'lhs_dilate', 'rhs_dilate')
  return [dict(zip(names, row, strict=True)) for row in rows]


def window_pairs(
  left: int, right: int, out: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
  """Return the pairs of output and window position on one axis that meet an element of the input.

  The others meet padding, or holes of a dilation: the compiler writes batched products so.
  """
  if (stride, pad, lhs_dilate) == (1, 0, 1):
    return out * right
  last = (left - 1) * lhs_dilate
  places = (o * stride + w * rhs_dilate - pad for o in range(out) for w in range(right))
  return sum(0 <= place <= last and place % lhs_dilate == 0 for place in places)


def kernel_flops(inside: dict[str, Instruction], call: Instruction) -> float:
  """Return the FLOPs of the attention kernel: products of [n, n, c] for each head and image."""
  count = next((each for name, each in ATTENTION_PRODUCTS.items() if name in call.name), 0)
  if not count:
    return 0
  b, n, columns = parse_arrays(inside[call.operands[0]].type)[0].sides  # d columns of q, k and v.
  return count * 2 * b * n * n * (columns // 3)
