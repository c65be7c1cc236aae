"""A breakdown as tables for the screen and as JSON."""

from vit_jax.tpu.breakdown import UNITS, Breakdown, Cost, Operation

SHOWN_OPERATIONS = 10
MIN_MIXED = 0.005  # Of all cycles.
MEBI, MILLION, BILLION = 2**20, 1e6, 1e9
COLUMNS = (
  'category', 'M cycles', '%', 'divided', 'GFLOP', 'vector Gop', 'HBM MiB', *UNITS, 'bound',
)  # fmt: skip


def breakdown_rows(found: Breakdown) -> list[tuple[str, ...]]:
  """Return the table of categories."""
  total, rows = found.total, [COLUMNS]
  for name, cost in [*found.categories.items(), ('total', total)]:
    divided = total.cycles if name == 'total' else found.shared.get(name, 0)
    rows.append(
      (
        name,
        f'{cost.cycles / MILLION:.2f}',
        f'{100 * cost.cycles / max(1, total.cycles):.1f}',
        f'{divided / MILLION:.2f}',
        f'{cost.flops / BILLION:,.1f}',
        f'{cost.vector_ops / BILLION:,.2f}',
        f'{cost.hbm_bytes / MEBI:,.0f}',
        *(f'{cost.limits[unit] / MILLION:.2f}' for unit in UNITS),
        format_bound(cost),
      )
    )
  return rows


def format_bound(cost: Cost) -> str:
  """Return the unit that is the limit, and the share of the cycles for which it would be busy."""
  if not cost.bound or not cost.cycles:
    return cost.bound or '-'
  return f'{cost.bound} {100 * cost.limits[cost.bound] / cost.cycles:.0f} %'


def operation_rows(operations: list[Operation]) -> list[tuple[str, ...]]:
  """Return the table of the most expensive operations."""
  return [('operation', 'M cycles', 'runs', 'bound', 'source', 'category')] + [
    (
      operation.name,
      f'{operation.cost.cycles / MILLION:.2f}',
      f'{operation.times}',
      format_bound(operation.cost),
      operation.source or '-',
      operation.category + (f' (also {", ".join(operation.also)})' if operation.also else ''),
    )
    for operation in operations[:SHOWN_OPERATIONS]
  ]


def format_mixed(found: Breakdown) -> list[str]:
  """Return a line for each category whose fusions compute others too, without small ones."""
  least = MIN_MIXED * found.total.cycles
  mixed = {
    name: {other: cycles for other, cycles in others.items() if cycles >= least}
    for name, others in found.mixed.items()
  }
  return [
    f'{name}: '
    + ', '.join(
      f'{cycles / MILLION:.2f} M cycles in fusions with {other}'
      for other, cycles in sorted(others.items(), key=lambda item: -item[1])
    )
    for name, others in mixed.items()
    if others
  ]


def breakdown_to_json(found: Breakdown) -> dict:
  """Return a breakdown as an object for JSON, with the operations that the text shows."""
  return {
    'cycles': found.total.cycles,
    'categories': {
      name: cost_to_json(cost) | {'divided_cycles': found.shared.get(name, 0)}
      for name, cost in found.categories.items()
    },
    'mixed': found.mixed,
    'operations': [
      {
        'name': each.name,
        'category': each.category,
        'also': each.also,
        'runs': each.times,
        'source': each.source,
        'op_name': each.op_name,
      }
      | cost_to_json(each.cost)
      for each in found.operations[:SHOWN_OPERATIONS]
    ],
  }


def cost_to_json(cost: Cost) -> dict:
  """Return a cost as an object for JSON."""
  return {
    'cycles': cost.cycles,
    'flops': cost.flops,
    'vector_ops': cost.vector_ops,
    'hbm_bytes': cost.hbm_bytes,
    'limits': cost.limits,
    'bound': cost.bound,
  }
