"""What a run learns, as far as model, loss and evaluation differ: the labels of images, or the look of masked patches."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax

from vit_jax.config import Config
from vit_jax.errors import UserError
from vit_jax.evaluate.classify import classify, count
from vit_jax.evaluate.frozen import PROTOCOLS
from vit_jax.evaluate.patches import count_patches, patch_means
from vit_jax.evaluate.protocols import parse
from vit_jax.models.families import build_model
from vit_jax.models.masked import build_masked_vit
from vit_jax.optim.losses import LOSSES, MASK_LOSSES, make_training_loss


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
  """`said` below is what the model gives for a batch of images."""

  build: Callable[[int], nn.Module]  # Classes of the data -> what is trained,
  judged: Callable[
    [int], nn.Module
  ]  # and what config.probes judge of it, with the same parameters.
  loss: Callable[[jax.Array, jax.Array], jax.Array]  # (said, targets [b, k]) -> [b].
  count: Callable[
    ..., dict[str, jax.Array]
  ]  # (parameters, batch, predict=…) -> sums over its examples.
  means: Callable[[Iterable[dict]], dict[str, float]]  # Of what `count` gave for each batch.


def make_task(config: Config) -> Task:
  """The one that config.mask says. UserError where the model cannot have it."""
  return masked_patch_task(config) if config.mask.target else classification_task(config)


def classification_task(config: Config) -> Task:
  """Of the labels that images have."""
  model = functools.partial(build_model, config.model)
  counted = functools.partial(count, loss=LOSSES[config.loss])
  return Task(
    build=model, judged=model, loss=make_training_loss(config), count=counted, means=classify
  )


def masked_patch_task(config: Config) -> Task:
  """Without labels. Whole images are judged by the features of a model without a head."""
  model, loss = build_masked_vit(config), MASK_LOSSES[config.mask.target]
  for entry in config.probes:
    if parse(entry)[0] not in PROTOCOLS:
      known = ' and '.join(PROTOCOLS)
      raise UserError(
        f'config.probes: {entry!r} asks for classes, and config.mask.target learns none; there are {known}'
      )
  return Task(
    build=lambda classes: model,
    judged=lambda classes: build_model(config.model, 0),
    loss=loss,
    count=functools.partial(count_patches, loss=loss),
    means=patch_means,
  )
