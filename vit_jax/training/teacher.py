"""The teacher of knowledge distillation: a frozen model that `config.distill` names."""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import numpy as np

from vit_jax.config import Config, ModelConfig
from vit_jax.data.class_names import first_different_class
from vit_jax.errors import UserError
from vit_jax.models.families import build_model
from vit_jax.pretrained.adapters import checksum
from vit_jax.pretrained.loading import load
from vit_jax.pretrained.model import PretrainedModel

HEAD_KERNEL = 'head/kernel'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
  """A loaded teacher, whose classes and images are those of the run."""

  model: nn.Module
  params: dict  # Nested float32 NumPy arrays.
  notes: list[str]  # Lines for the screen.

  @property
  def facts(self) -> dict[str, object]:
    """Facts that are recorded with the run's data: a run does not resume with another teacher."""
    flat = flax.traverse_util.flatten_dict(self.params, sep='/')
    return {'teacher.variant': self.model.config.variant, 'teacher.content': checksum(flat)}


def load_teacher(config: Config, labels: tuple[str, ...]) -> Teacher | None:
  """Load the teacher of a run on data with the classes `labels`; None if there is none.

  It computes in `config.model.dtype`, and its position embeddings are resampled to the size of the
  run's images. Raises UserError if it does not exist, or cannot predict these classes for these
  images.
  """
  if not config.distill.teacher:
    return None
  open_teacher = functools.partial(load, config.distill.teacher, dtype=config.model.dtype)
  pretrained, size = open_teacher(), config.data.size
  notes = [f'learns from {pretrained.source}']
  if pretrained.size != size:
    notes.append('its images have {}x{} pixels here, and had {}x{}'.format(*size, *pretrained.size))
    pretrained = open_teacher(size=size)
  check_teacher(config, pretrained, labels)
  if pretrained.loss == 'sigmoid':
    notes.append('it was trained with the sigmoid loss; here its classes exclude one another')
  notes += pretrained.notes
  return Teacher(model=pretrained.model, params=pretrained.params, notes=notes)


def check_teacher(config: Config, pretrained: PretrainedModel, labels: tuple[str, ...]):
  """Raise UserError unless a teacher takes the images of a run and predicts its classes."""
  subject = f'config.distill.teacher={config.distill.teacher!r}'
  pretrained.check_has_head()
  if not np.any(flax.traverse_util.flatten_dict(pretrained.params, sep='/')[HEAD_KERNEL]):
    raise UserError(f'{subject} predicts nothing: its head is zeros; fine-tune it first')
  expected, variant = config.distill.variant, pretrained.config.variant
  if expected not in ('', variant):
    raise UserError(f'config.distill.variant={expected!r}, but {pretrained.source} is {variant!r}')
  ours, theirs = config.model.channels, pretrained.config.channels
  if ours != theirs:
    raise UserError(
      f'{subject} takes images of {theirs} channels, but config.model.channels={ours}'
    )
  names = pretrained.labels or labels  # Without names, the number of classes has to agree.
  different = first_different_class(names, labels)
  if not different and pretrained.classes != len(labels):
    different = f'{pretrained.classes:,} and {len(labels):,} classes'
  if different:
    raise UserError(
      f'{subject}: the classes of {pretrained.source} are not those of the data: the first that '
      f'differ are {different}'
    )


def describe_teacher(config: Config, classes: int) -> nn.Module | None:
  """Return the teacher's model for a program that does not run; None if there is no teacher.

  `config.distill.variant` describes it without its file. Raises UserError if that is '' and the
  file cannot be read.
  """
  distill, student = config.distill, config.model
  if not distill.teacher:
    return None
  if not distill.variant:
    try:
      return load(distill.teacher, dtype=student.dtype, size=config.data.size).model
    except UserError as error:
      raise UserError(
        f'{error} config.distill.variant=NAME describes a teacher without its file'
      ) from None
  names = ('channels', 'mean', 'scale', 'dtype')
  fields = {name: getattr(student, name) for name in names}
  return build_model(ModelConfig(variant=distill.variant, **fields), classes)
