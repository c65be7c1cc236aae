"""The task of a run: classification of images, or prediction of masked patches.

A task is where model, loss and evaluation differ. The training loop is the same for all tasks.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax

from vit_jax.config import Config
from vit_jax.errors import UserError
from vit_jax.evaluate.evaluator import Output, Rows
from vit_jax.evaluate.outputs import (
  classification,
  masked_patches,
  mean_classification_metrics,
  mean_masked_patch_metrics,
)
from vit_jax.evaluate.probes import PROBES
from vit_jax.evaluate.protocols import parse_protocol
from vit_jax.models.families import build_model
from vit_jax.models.lora import with_adapters
from vit_jax.models.masked import build_masked_vit
from vit_jax.optim.losses import MASK_LOSSES, make_training_loss


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
  """Functions that define what is learned.

  `outputs` are what the trained model returns for a batch.
  """

  build_model: Callable[[int], nn.Module]  # Number of classes -> the model that is trained.
  build_probed_model: Callable[[int], nn.Module]  # The model, of the same parameters, for probes.
  loss: Callable[[jax.Array, jax.Array], jax.Array]  # (outputs, targets [b, k]) -> losses [b].
  eval_output: Output  # What an evaluation computes for each example.
  aggregate_metrics: Callable[[Rows], dict[str, float]]  # The rows of `eval_output` -> means.


def make_task(config: Config) -> Task:
  """Return the task that `config.mask` selects.

  Raises UserError if the model or a probe does not support it.
  """
  return masked_patch_task(config) if config.mask.target else classification_task(config)


def classification_task(config: Config) -> Task:
  """Return the task of predicting the labels of images."""

  def build(classes: int):
    return with_adapters(build_model(config.model, classes), config.lora)

  return Task(
    build_model=build,
    build_probed_model=build,
    loss=make_training_loss(config),
    eval_output=classification(config.loss),
    aggregate_metrics=mean_classification_metrics,
  )


def masked_patch_task(config: Config) -> Task:
  """Return the task of predicting corrupted patches (arXiv 2010.11929, App. B.1.2).

  It needs no labels. Probes evaluate the features that the same parameters give for images without
  corruption.
  """
  for entry in config.probes:
    if parse_protocol(entry)[0] not in PROBES:
      raise UserError(
        f'config.probes: {entry!r} needs class logits, and config.mask.target trains a model '
        'without classes; '
        f'use {" or ".join(PROBES)}'
      )
  model, loss = build_masked_vit(config), MASK_LOSSES[config.mask.target]
  return Task(
    build_model=lambda classes: model,
    build_probed_model=lambda classes: build_model(config.model, 0),
    loss=loss,
    eval_output=masked_patches(loss),
    aggregate_metrics=mean_masked_patch_metrics,
  )
