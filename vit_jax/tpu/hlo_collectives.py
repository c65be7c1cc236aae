"""Bytes of the collectives in a compiled program, from its HLO text.

Loops count as often as they run.

The bytes are those of full arrays: the result of an all-gather, the operand of an all-reduce or
reduce-scatter. A ring moves (n - 1) / n of them through each of n devices, and an all-reduce twice
as many.
"""

import math
import re

from vit_jax.tpu.hlo_cost import CALLED, loop_trip_count, parse_computations

COLLECTIVE_KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
COLLECTIVE = re.compile(
  rf'\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s({"|".join(COLLECTIVE_KINDS)})(-start)?\(([^)]*)\)'
)
RESULT = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s[\w\-]+\(')
ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
CHANNEL = re.compile(r'channel_id=\d+|chain_id="\d+"')
WHILE = re.compile(r'\swhile\(.*body=%?([\w.\-]+)')
FUSED_REDUCE_SCATTER = (
  'all-reduce-scatter'  # The compiler's name for an all-reduce fused with the slice that follows.
)
BITS = re.compile(r'\D+(\d+)')


def collective_bytes(hlo: str) -> dict[str, float]:
  """Return {kind: bytes} of one run of a program, from `compiled.as_text()`.

  Raises ValueError if there is no entry computation.
  """
  bodies, entry = parse_computations(hlo)
  if entry is None:
    raise ValueError('the text has no ENTRY computation: it is not HLO')
  found = {}
  add_collectives(bodies, entry, found, times=1, above=())
  out = dict.fromkeys((kind for kind, _ in found), 0.0)
  for (kind, _), count in found.items():
    out[kind] += count
  return out


def add_collectives(
  bodies: dict[str, list[str]],
  name: str,
  found: dict[tuple[str, str], float],
  *,
  times: int,
  above: tuple[str, ...],
):
  """Add the bytes of all collectives below computation `name`, which runs `times`, to `found`.

  The key is the kind with the name or chain. A TPU's compiler repeats an instruction in each fusion
  that works on it, and numbers such chains.
  """
  for line in bodies.get(name, ()):
    if match := COLLECTIVE.match(line):
      chain = ' '.join(CHANNEL.findall(line))
      kind = 'reduce-scatter' if name.startswith(FUSED_REDUCE_SCATTER) else match[3]
      found[kind, chain if 'chain' in chain else match[1]] = times * collective_size(
        match, bodies[name], scatter=kind != match[3]
      )
      continue
    loop = WHILE.search(line)
    runs = times * (loop_trip_count(bodies, line) or 1) if loop else times
    for callee in [loop[1]] if loop else CALLED.findall(line):
      if callee in bodies and callee not in above:
        add_collectives(bodies, callee, found, times=runs, above=(*above, name))


def collective_size(match: re.Match, body: list[str], *, scatter: bool) -> float:
  """Return the bytes of the arrays of one collective, a match of COLLECTIVE in `body`.

  `scatter` means that the body is a FUSED_REDUCE_SCATTER, which pads its operand.
  """
  if scatter:
    return sum(
      array_bytes(array)
      for line in body
      if ' parameter(' in line
      for array in ARRAY.findall(RESULT.match(line)[2])
    )
  _, result, kind, start, operands = match.groups()
  if kind == 'reduce-scatter':  # Its result is only a device's shard.
    types = {found[1]: found[2] for line in body if (found := RESULT.match(line))}
    return sum(
      array_bytes(array)
      for operand in re.findall(r'%([\w.\-]+)', operands)
      for array in ARRAY.findall(types[operand])
    )
  arrays = ARRAY.findall(result)
  if start and kind != 'all-reduce':  # (operands, results, and a permute's two contexts).
    arrays = [array for array in arrays if array != ('u32', '')]
    arrays = arrays[len(arrays) // 2 :]
  return sum(map(array_bytes, arrays))


def array_bytes(array: tuple[str, str]) -> float:
  """Return the bytes of an array given as ('f32', '768,3072')."""
  dtype, sides = array
  bits = 8 if dtype == 'pred' else int(BITS.match(dtype)[1])
  return bits / 8 * math.prod(map(int, filter(None, sides.split(','))))
