"""Apply a model to every example of a source once, over all devices and hosts.

Training, `evaluate`, probes, pseudo-labels, `predict` and figures all run this loop. They differ
in their `Output`, the arrays that are computed for each example (see outputs.py).

The host sums the rows in float64 and in the order of the source. The number of devices does not
change that order. Batches of another size may change the last digits of a row: XLA then tiles
matrix products in another way.

Shapes: b batch, n examples, m labels of an example.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data.loader import eval_batches
from vit_jax.data.prefetch import host_kwargs, prefetch_to_device
from vit_jax.data.preprocessing import Preprocessing, eval_preprocessing
from vit_jax.sharding.fsdp import (
  shard_map_rows,
  state_shardings,
  state_specs,
  with_block_gather,
)
from vit_jax.sharding.mesh import Mesh, batch_sharding, replicated

_MAX_BATCHES_IN_FLIGHT = 2  # The host reads the rows of one batch while the next is computed.

Rows = dict[str, np.ndarray]


class PreemptedError(Exception):
  """The run has to stop before the evaluation is complete."""


class Output(NamedTuple):
  """The function that is applied to each batch, (model, params, batch) -> {name: [b, …]}.

  A batch is {'image': [b, h, w, 3], 'label': [b, m], 'mask': [b]}. Images are unrounded float32, as
  in the evaluations that published accuracies come from. They are uint8 if `exact_images` is False.
  An evaluator compiles each output once.
  """

  apply: Callable[[nn.Module, dict, dict[str, jax.Array]], dict[str, jax.Array]]
  exact_images: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evaluator:
  """Applies one model to sources of examples. Parameters may change between calls."""

  model: nn.Module
  param_shapes: dict  # Arrays or their shapes, which decide how they are sharded over `mesh`.
  mesh: Mesh
  data: DataConfig
  preprocessing: Preprocessing | None = None  # None means that of `data` and the model.
  should_stop: Callable[[object], bool] = lambda outputs: (
    False
  )  # Called with every batch's outputs.
  on_batch: Callable[[int], None] = lambda examples: None  # Called with the size of every batch.
  programs: dict = dataclasses.field(default_factory=dict)  # Compiled programs.

  @property
  def batch(self) -> int:
    """The batch size of the config, rounded up to a multiple of the number of devices."""
    size = self.data.eval_batch or self.data.batch
    return -(-size // self.mesh.size) * self.mesh.size

  @property
  def steps(self) -> Preprocessing:
    """The preprocessing of the images."""
    return self.preprocessing or eval_preprocessing(self.data, self.model.config)

  def rows(self, params: dict, source, output: Output) -> Rows:
    """Return the rows of all examples, {'label': [n, m], 'mask': [n], **output}. See `batches`."""
    return concatenate_rows(self.batches(params, source, output))

  def batches(self, params: dict, source, output: Output) -> Iterator[Rows]:
    """Yield the rows of each batch, in the order of `source`, to every host.

    'mask' is False for examples that cannot be read. The last batch is not padded. Raises
    PreemptedError if `should_stop` returns True, which all hosts must do after the same batch.
    """
    program = self.compile(params, source, output)
    loaded = self._load(source, output, **host_kwargs())
    running: collections.deque[dict[str, jax.Array]] = collections.deque()
    for _, batch in prefetch_to_device(loaded, self.data.prefetch, self.mesh):
      running.append(program(params, batch))
      if self.should_stop(running[-1]):
        raise PreemptedError
      if len(running) == _MAX_BATCHES_IN_FLIGHT:
        yield self._fetch(running.popleft(), len(source))
    while running:
      yield self._fetch(running.popleft(), len(source))

  def compile(self, params: dict, source, output: Output) -> Callable:
    """Return the program (parameters, batch) -> rows for the batches of `source`."""
    b, dtype = self.batch, np.float32 if output.exact_images else np.uint8
    shapes = {
      'image': ((b, *self.steps.size, self.model.config.channels), dtype),
      'label': ((b, source.max_labels), np.int32),
      'mask': ((b,), np.bool_),
      'index': ((b,), np.int32),
    }
    if (key := (output, *shapes.values())) not in self.programs:
      sharding = batch_sharding(self.mesh)
      batch = {name: jax.ShapeDtypeStruct(*x, sharding=sharding) for name, x in shapes.items()}
      with jax.set_mesh(self.mesh):  # Kernels ask the mesh how a batch is split.
        self.programs[key] = self._jit(output).lower(params, batch).compile()
    return self.programs[key]

  def _jit(self, output: Output) -> Callable:
    specs = state_specs(self.param_shapes, self.mesh)

    def evaluate_batch(shards: dict, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
      model, gather = with_block_gather(self.model, specs)
      kept = {name: batch[name] for name in ('label', 'mask', 'index')}
      return output.apply(model, gather(shards), batch) | kept

    sharded = shard_map_rows(evaluate_batch, self.mesh, specs)
    sharded.__name__ = evaluate_batch.__name__  # Profiles and compilation events show it.
    shardings = (state_shardings(self.param_shapes, self.mesh), batch_sharding(self.mesh))
    return jax.jit(sharded, in_shardings=shardings, out_shardings=replicated(self.mesh))

  def _load(self, source, output: Output, *, host: int, hosts: int) -> Iterator[Rows]:
    """Yield this host's part of the batches. 'index' is the index of a row in the source.

    The mesh may list devices in another order than that of the hosts that feed them.
    """
    data = dataclasses.replace(self.data, eval_batch=self.batch)
    b = self.batch // hosts
    options = {'exact': output.exact_images, 'steps': self.steps}
    batches = eval_batches(source, data, host=host, hosts=hosts, **options)
    for k, batch in enumerate(batches):
      first = (k * hosts + host) * b
      yield batch | {'index': np.arange(first, first + b, dtype=np.int32)}

  def _fetch(self, outputs: dict[str, jax.Array], examples: int) -> Rows:
    """Wait for the rows of a batch. Return them in the order of the source, without padding."""
    rows = jax.device_get(outputs)
    index = rows.pop('index')
    self.on_batch(len(index))
    order = np.argsort(index)[: np.sum(index < examples)]
    return {name: values[order] for name, values in rows.items()}


def concatenate_rows(batches: Iterable[Rows]) -> Rows:
  """Join the rows of all batches."""
  parts = list(batches)
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def make_pretrained_evaluator(
  model, data: DataConfig, *, on_batch: Callable[[int], None] = lambda examples: None
) -> tuple[Evaluator, dict]:
  """Return an evaluator of a `PretrainedModel` on all devices, and its parameters on them."""
  evaluator = Evaluator(
    model=model.model,
    param_shapes=model.params,
    mesh=model.mesh,
    data=data,
    preprocessing=model.preprocessing,
    on_batch=on_batch,
    programs=model.programs,
  )
  return evaluator, model.device_params
