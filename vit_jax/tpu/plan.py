"""Compile a run's train step for a TPU slice: does it fit, and how long does it take?

Memory is the compiler's own account. Times are estimates: the compiler's cycles (`hlo_cost.py`)
over the clock of the chip.
"""

import dataclasses
import math
import re
import time

import jax

from vit_jax.config import Config, LoraConfig
from vit_jax.config_checks import validate
from vit_jax.models.families import FAMILIES, family_name
from vit_jax.sharding.fsdp import split_params
from vit_jax.step import TrainState
from vit_jax.tpu.cost import core_days
from vit_jax.tpu.hlo_collectives import collective_bytes
from vit_jax.tpu.hlo_cost import program_cost
from vit_jax.tpu.hlo_kernels import KernelSchedule, kernel_schedules
from vit_jax.tpu.topologies import GIB, Topology, topology_devices
from vit_jax.training.dry_run import data_dimensions
from vit_jax.training.program import (
  Program,
  abstract_state,
  abstract_teacher,
  compile_train_step,
  make_program,
  training_flops,
)
from vit_jax.training.setup import count_elements
from vit_jax.training.task import make_task
from vit_jax.training.teacher import describe_teacher

# The compiler reports either the total of all live buffers, or, if it gives up earlier, the need of
# the step itself.
OUT_OF_MEMORY = re.compile(
  r'Used ([\d.]+)([MGT]) of [\d.]+[MGT] hbm|temporaries \(([\d.]+)([MGT])\) exceeds', re.IGNORECASE
)
UNIT_BYTES = {'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
  """One config on one topology.

  Bytes are per device. Fields are None if the program did not compile for lack of memory.
  """

  topology: Topology
  fits: bool
  hbm: float  # Peak bytes.
  memory: dict[str, float]  # Use of the bytes by name.
  parameters: int
  trained: int  # Parameters that are trained.
  teacher: int = 0  # Parameters of the teacher of distillation, which `parameters` do not include.
  lora: dict[str, tuple[float, float]]  # Use of the bytes by name: with adapters, and without.
  flops: float  # FLOPs of a step, analytic: see `training_flops`.
  steps: int
  batch: int
  cycles: int | None
  missing: tuple[str, ...]
  collectives: dict[str, float]
  kernels: dict[str, KernelSchedule] = dataclasses.field(default_factory=dict)
  compile_seconds: float

  @property
  def seconds_per_step(self) -> float | None:
    """Estimated seconds per step."""
    return self.cycles / self.topology.generation.ghz / 1e9 if self.cycles else None

  @property
  def mfu(self) -> float | None:
    """Estimated model FLOPs utilization.

    The model's own FLOPs over the peak of the chips in that time.
    """
    if not self.seconds_per_step:
      return None
    return (
      self.flops / self.seconds_per_step / (self.topology.generation.flops * self.topology.chips)
    )


def plan_run(config: Config, topology: Topology) -> tuple[Plan, str]:
  """Return (the plan, the text of the compiled program) of a run on a topology.

  Raises UserError if config, data and topology do not fit each other.
  """
  config = validate(config)
  examples, classes, labels = data_dimensions(config)
  program = make_program(
    config,
    make_task(config),
    examples=examples,
    classes=classes,
    label_slots=labels,
    devices=topology_devices(topology.name, topology.slices),
    teacher=describe_teacher(config, classes),
  )
  state, teacher = abstract_state(program), abstract_teacher(program)
  began = time.monotonic()
  known = {
    'topology': topology,
    'parameters': count_elements(state.params),
    'trained': count_elements(split_params(state.params, program.is_trained)[0]),
    'teacher': count_elements(teacher),
    'lora': compare_lora(program, examples),
    'flops': training_flops(config, program.model, config.data.batch, program.teacher),
    'steps': program.steps,
    'batch': config.data.batch,
  }
  try:
    compiled = compile_train_step(program)
  except jax.errors.JaxRuntimeError as error:
    return Plan(**known, **parse_out_of_memory(error), compile_seconds=time.monotonic() - began), ''
  seconds, hlo = time.monotonic() - began, compiled.as_text()
  peak, memory = memory_breakdown(compiled, state, teacher)
  kernels = attention_kernels(program, topology, hlo)
  counted = program_cost(hlo, {name: made.cycles for name, made in kernels.items()})
  made = Plan(
    **known,
    fits=peak <= topology.generation.hbm * GIB / topology.generation.devices,
    hbm=peak,
    memory=memory,
    cycles=counted.cycles,
    missing=counted.missing,
    collectives=collective_bytes(hlo),
    kernels=kernels,
    compile_seconds=seconds,
  )
  return made, hlo


def compare_lora(program: Program, examples: int) -> dict[str, tuple[float, float]]:
  """Return {'gradients': (bytes of a device with adapters, without them), …}; {} without adapters.

  Nothing is compiled. The gradients are those that a step sums over the devices.
  """
  config = program.config
  if not config.lora.rank:
    return {}
  full = make_program(
    dataclasses.replace(config, lora=LoraConfig()),
    make_task(dataclasses.replace(config, lora=LoraConfig())),
    examples=examples,
    classes=program.model.classes,
    label_slots=program.label_slots,
    devices=list(program.mesh.devices.flat),
    teacher=program.teacher,
  )
  with_lora, without = training_bytes(program), training_bytes(full)
  return {name: (size, without[name]) for name, size in with_lora.items()}


def training_bytes(program: Program) -> dict[str, float]:
  """Return the bytes of a device for the parameters, their gradients and the optimizer."""
  state = abstract_state(program)
  return {
    'parameters': held_bytes(state.params),
    'gradients': held_bytes(split_params(state.params, program.is_trained)[0]),
    'optimizer': held_bytes(state.opt_state),
  }


def held_bytes(tree) -> float:
  """Return the bytes that a device holds of a tree of arrays or their shapes, with shardings."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def attention_kernels(program: Program, topology: Topology, hlo: str) -> dict[str, KernelSchedule]:
  """Return the schedule of each hand-written kernel in the program.

  A name is followed by a part of the shape of the result if it is a kernel of the teacher.
  """
  config, found = program.config, {}
  calls = [line for line in hlo.splitlines() if 'tpu_custom_call' in line]
  b = config.data.batch // config.optim.grad_accum_steps // topology.devices
  for model in filter(None, (program.teacher, program.model)):
    c, s = model.config, model.shape
    n, d = math.prod(s.grid(config.data.size)) + c.prefix_tokens + c.registers, s.width
    if not any(f',{n},{d}]' in line for line in calls):
      continue
    shape = {'b': b, 'n': n, 'd': d, 'heads': s.heads, 'dtype': c.dtype}
    suffix = f' {n},{d}]' if model is program.teacher else ''
    schedules = kernel_schedules(topology.name, **shape, rope=c.has_rope)
    found |= {name + suffix: made for name, made in schedules.items()}
  return found


def memory_remedies(config: Config, topology: Topology) -> list[dict[str, object]]:
  """Return settings that make a run smaller, the cheapest first.

  Remat, accumulation, fsdp, then combinations.
  """
  c, devices, slice_ = (
    config,
    topology.devices,
    topology.devices // topology.slices,
  )  # fsdp stays within a slice.
  kinds = FAMILIES[family_name(c.model.variant)].remat_choices
  remat = [{'model.remat': kind} for kind in kinds[kinds.index(c.model.remat) + 1 :]]
  parts = [c.optim.grad_accum_steps * 2**i for i in range(1, 6)]
  parts = [
    {'optim.grad_accum_steps': count} for count in parts if c.data.batch % (count * devices) == 0
  ]
  shares = [
    {'mesh.fsdp': count}
    for count in sorted({8, slice_})
    if c.mesh.fsdp < count and slice_ % count == 0
  ]
  full = remat[-1] if remat else {}
  both = [full | part for part in parts] + [full | share for share in shares]
  every = [full | part | shares[-1] for part in parts] if shares else []
  return [*remat, *parts, *shares, *(both if full else []), *every]


def memory_breakdown(compiled, state: TrainState, teacher: dict) -> tuple[float, dict[str, float]]:
  """Return (bytes of a device at the peak, their use by name)."""
  found = compiled.memory_analysis()
  arguments, out, kept = (
    found.argument_size_in_bytes,
    found.output_size_in_bytes,
    found.alias_size_in_bytes,
  )
  peak = (
    getattr(found, 'peak_memory_in_bytes', 0) or arguments + out - kept + found.temp_size_in_bytes
  )
  parts = {
    'parameters': held_bytes(state.params),
    'optimizer': held_bytes(state.opt_state),
    'average': held_bytes(state.ema),
    'teacher': held_bytes(teacher),
  }
  parts['batch'] = max(0, arguments - sum(parts.values()))
  parts['gradients and activations'] = max(0, peak - sum(parts.values()))
  return peak, {name: size for name, size in parts.items() if size}


def parse_out_of_memory(error: Exception) -> dict:
  """Return the fields of a Plan from the error for a program that is too large.

  Raises any other error again.
  """
  match = OUT_OF_MEMORY.search(str(error))
  if not match:
    raise error
  size, unit = filter(None, match.groups())
  used = float(size) * UNIT_BYTES[unit.upper()]
  return {
    'fits': False,
    'hbm': used,
    'memory': {},
    'cycles': None,
    'missing': (),
    'collectives': {},
  }


def format_plan(config: Config, plan: Plan) -> list[str]:
  """Format the plan for the screen. Estimates are marked."""
  t, g = plan.topology, plan.topology.generation
  gib = lambda count: f'{count / GIB:.2f}'
  size = 'x'.join(map(str, config.data.size))
  lines = [
    f'{config.model.variant} at {size}, batch {plan.batch:,}, on {t.chips} chips of {t.name} '
    f'({format_hosts(t.hosts)}), '
    f'fsdp {config.mesh.fsdp}; compiled in {plan.compile_seconds:.0f} s',
    f'memory      {gib(plan.hbm)} of {g.hbm / g.devices:g} GiB: it '
    f'{"fits" if plan.fits else "does NOT fit"}'
    + ''.join(f'; {name} {gib(value)}' for name, value in plan.memory.items()),
    f'parameters  {plan.parameters:,}' + format_trained(plan),
    f'model FLOPs {plan.flops / 1e12:.1f} T a step; {plan.flops * plan.steps / 1e18:,.0f} '
    f'exaFLOPs in {plan.steps:,} steps',
  ]
  lines += [
    f'LoRA        {name} {with_lora / 2**20:,.1f} MiB of a device, {full / 2**20:,.1f} without'
    for name, (with_lora, full) in plan.lora.items()
  ]
  if not plan.seconds_per_step:
    return lines
  seconds = plan.seconds_per_step * plan.steps
  rate = plan.batch / plan.seconds_per_step
  days = core_days(plan.flops * plan.steps / 1e18, plan.mfu)
  lines += [
    f'step        {plan.cycles / 1e6:.1f} M cycles at {g.ghz:g} GHz = '
    f'{1000 * plan.seconds_per_step:.1f} ms (estimate); '
    f'MFU {100 * plan.mfu:.0f} % (estimate)',
    f'images      {rate:,.0f} /s (estimate), {rate / t.hosts:,.0f} /s to decode for each of '
    f'{format_hosts(t.hosts)}',
    f'run         {seconds / 3600:,.1f} hours, {seconds / 3600 * t.chips:,.0f} chip-hours, '
    f'{days:,.0f} TPUv3-core-days at that '
    'MFU (estimates)',
  ]
  over = 'ICI' if t.slices == 1 else 'ICI, and DCN between slices'
  lines += [
    f'network     {name} of {value / 1e6:,.1f} MB a step over {over}'
    for name, value in plan.collectives.items()
  ]
  return lines + [f'not counted {what}' for what in plan.missing]


def format_trained(plan: Plan) -> str:
  """Return the number of trained parameters and their share, if not all, and the teacher's."""
  teacher = f', and {plan.teacher:,} of the teacher' if plan.teacher else ''
  if plan.trained == plan.parameters:
    return teacher
  return f', {plan.trained:,} ({100 * plan.trained / plan.parameters:.2g} %) trained{teacher}'


def format_hosts(count: int) -> str:
  """Return '1 host' or 'n hosts'."""
  return f'{count} host' + ('s' if count > 1 else '')


def compare_plans(plans: dict[str, Plan]) -> list[tuple[str, ...]]:
  """Return a table of several plans."""
  number = lambda value, text: text.format(value) if value is not None else '-'
  hours = lambda plan: (
    plan.seconds_per_step and plan.seconds_per_step * plan.steps * plan.topology.chips / 3600
  )
  rows = {
    'fits': lambda plan: 'yes' if plan.fits else 'no',
    'GiB of a chip': lambda plan: f'{plan.hbm / GIB:.2f} of {plan.topology.generation.hbm}',
    'M cycles a step': lambda plan: number(plan.cycles and plan.cycles / 1e6, '{:.1f}'),
    'ms a step': lambda plan: number(
      plan.seconds_per_step and 1000 * plan.seconds_per_step, '{:.1f}'
    ),
    'MFU %': lambda plan: number(plan.mfu and 100 * plan.mfu, '{:.0f}'),
    'images/s': lambda plan: number(
      plan.seconds_per_step and plan.batch / plan.seconds_per_step, '{:,.0f}'
    ),
    'chip-hours': lambda plan: number(hours(plan), '{:,.0f}'),
    'network MB a step': lambda plan: f'{sum(plan.collectives.values()) / 1e6:,.1f}',
  }
  return [('estimates', *plans), *((name, *map(row, plans.values())) for name, row in rows.items())]
