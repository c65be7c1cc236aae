"""What crosses the network in a compiled program, from its HLO text: bytes a device's program names, loops counted as they run.

The bytes are those of whole arrays: what an all-gather gives, and what an all-reduce or a reduce-scatter takes. A ring moves
(n - 1) / n of that through each of n devices, and an all-reduce twice that.
"""

import math
import re

from vit_jax.tpu.hlo_cost import CALLED, computations, trip_count

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
COLLECTIVE = re.compile(
  rf'\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s({"|".join(KINDS)})(-start)?\(([^)]*)\)'
)
RESULT = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s[\w\-]+\(')
ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
CHAIN = re.compile(r'channel_id=\d+|chain_id="\d+"')
WHILE = re.compile(r'\swhile\(.*body=%?([\w.\-]+)')
SCATTER = 'all-reduce-scatter'  # What a TPU's compiler calls a fusion of an all-reduce and the cut that follows.
BITS = re.compile(r'\D+(\d+)')


def collective_bytes(hlo: str) -> dict[str, float]:
  """{kind: bytes} of one run of a program, from `compiled.as_text()`. ValueError where there is no entry computation."""
  bodies, entry = computations(hlo)
  if entry is None:
    raise ValueError('the text has no ENTRY computation: it is no HLO')
  found = {}
  collect(bodies, entry, found, times=1, above=())
  out = dict.fromkeys((kind for kind, _ in found), 0.0)
  for (kind, _), count in found.items():
    out[kind] += count
  return out


def collect(
  bodies: dict[str, list[str]],
  name: str,
  found: dict[tuple[str, str], float],
  *,
  times: int,
  above: tuple[str, ...],
):
  """Puts the bytes of every collective below computation `name`, which runs `times`, into `found`, by its kind and name,
  or chain: a TPU's compiler repeats an instruction in each fusion that works at it, and numbers such chains."""
  for line in bodies.get(name, ()):
    if match := COLLECTIVE.match(line):
      chain = ' '.join(CHAIN.findall(line))
      kind = 'reduce-scatter' if name.startswith(SCATTER) else match[3]
      found[kind, chain if 'chain' in chain else match[1]] = times * moved(
        match, bodies[name], scatter=kind != match[3]
      )
      continue
    loop = WHILE.search(line)
    runs = times * (trip_count(bodies, line) or 1) if loop else times
    for callee in [loop[1]] if loop else CALLED.findall(line):
      if callee in bodies and callee not in above:
        collect(bodies, callee, found, times=runs, above=(*above, name))


def moved(match: re.Match, body: list[str], *, scatter: bool) -> float:
  """Bytes of the arrays that one collective, a match of COLLECTIVE in `body`, is about. `scatter`: the body is one of SCATTER,
  which pads what it takes."""
  if scatter:
    return sum(
      size(array)
      for line in body
      if ' parameter(' in line
      for array in ARRAY.findall(RESULT.match(line)[2])
    )
  _, result, kind, start, operands = match.groups()
  if kind == 'reduce-scatter':  # Its result is a device's share.
    types = {found[1]: found[2] for line in body if (found := RESULT.match(line))}
    return sum(
      size(array)
      for operand in re.findall(r'%([\w.\-]+)', operands)
      for array in ARRAY.findall(types[operand])
    )
  arrays = ARRAY.findall(result)
  if start and kind != 'all-reduce':  # (operands, results, and a permute's two contexts).
    arrays = [array for array in arrays if array != ('u32', '')]
    arrays = arrays[len(arrays) // 2 :]
  return sum(map(size, arrays))


def size(array: tuple[str, str]) -> float:
  """Bytes of ('f32', '768,3072')."""
  dtype, sides = array
  bits = 8 if dtype == 'pred' else int(BITS.match(dtype)[1])
  return bits / 8 * math.prod(map(int, filter(None, sides.split(','))))
