"""Self-training with noisy students (arXiv 1911.04252): a teacher labels images, a student learns from them and is the next.

    WORKDIR/0-teacher    a run on labelled images, where the teacher is no model that is there already
    WORKDIR/1-labels     what the teacher, without noise, says of the unlabelled images (data/pseudo_labels.py)
    WORKDIR/1-student    a run on both kinds, with the noise that its config says; the teacher of 2-labels, and so on

A stage begins when the one before it is whole, and one that is whole is not done again.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.experimental.multihost_utils import sync_global_devices as wait_for_all

from vit_jax.checkpoint.run_directory import check_same_run, read_run_labels
from vit_jax.config import UNLABELLED_DEFAULTS, Config
from vit_jax.config_checks import validate
from vit_jax.data.pseudo_labels import check_same_pseudo_labels
from vit_jax.data.sources import open_source, open_unlabelled
from vit_jax.errors import UserError
from vit_jax.evaluate.pseudo_labelling import write_pseudo_labels
from vit_jax.metrics.records import format_metrics
from vit_jax.pretrained.loading import load
from vit_jax.runtime.cluster import print_stderr
from vit_jax.runtime.files import read_json_object, write_atomically
from vit_jax.runtime.preemption import Preemption
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.train import train

STAGE_RESULT_FILE = 'done.json'  # In the directory of a stage that is whole: what came of it.


@dataclasses.dataclass(frozen=True, slots=True)
class TrainStage:
  """A stage that is a run."""

  where: Path
  config: Config

  def refuse_others(self):
    """UserError where the directory holds another run: the settings that differ are named."""
    if (self.where / 'labels.txt').is_file():
      check_same_run(self.where, self.config, read_run_labels(self.where))

  def fill(self, stopping: Preemption, watchdog: Watchdog) -> dict[str, float]:
    """Trains to the end; the last evaluation."""
    return train(self.config, self.where, preemption=stopping, watchdog=watchdog)


@dataclasses.dataclass(frozen=True, slots=True)
class LabelStage:
  """A stage that labels the unlabelled images of a student's config."""

  where: Path
  teacher: str  # Whatever `load` takes, or the name of the stage beside this one that trains it.
  config: Config

  @property
  def asked(self) -> dict[str, object]:
    """What is asked for, by name."""
    data = self.config.data
    return {
      'teacher': self.teacher,
      'unlabelled': data.unlabelled,
      'unlabelled_split': data.unlabelled_split,
    }

  def refuse_others(self):
    """UserError where the directory holds other labels: what differs is named."""
    check_same_pseudo_labels(self.where, self.asked)

  def fill(self, stopping: Preemption, watchdog: Watchdog) -> dict[str, int]:
    """Labels what is not labelled yet; how many images there are."""
    data, alive = self.config.data, self.config.first_step_timeout
    watchdog.arm(alive)
    stage = self.where.parent / self.teacher
    source = open_unlabelled(data.unlabelled, data.unlabelled_split, dir=data.dir)
    write_pseudo_labels(
      load(str(stage if stage.is_dir() else self.teacher)),
      source,
      self.where,
      classes=open_source(data.train, data.split, dir=data.dir).label_names,
      asked=self.asked,
      progress=lambda images: watchdog.arm(alive),
      batch=data.eval_batch or data.batch,
      **{name: getattr(data, name) for name in ('workers', 'threads', 'bad_images', 'max_pixels')},
    )
    return {'images': len(source)}


def self_train(
  teacher: Config | str,
  students: Sequence[Config],
  workdir: Path,
  *,
  stopping: Preemption | None = None,
  watchdog: Watchdog | None = None,
) -> dict[str, dict]:
  """Does what is left to do; {'0-teacher': {'test_accuracy': …}, …}, what came of each stage.

  `teacher`: a run on labelled images alone, or whatever `load` takes. UserError, before the first device is used, where a
  config is wrong or `workdir` holds something else. Where `stopping` is told so, it saves and exits with that one's exit code.
  """
  stopping, watchdog = stopping or Preemption(), watchdog or Watchdog()
  stages = [*plan_stages(teacher, students, workdir)]
  for stage in stages:
    stage.refuse_others()
  results = {}
  for i, stage in enumerate(stages):
    name, done = stage.where.name, stage.where / STAGE_RESULT_FILE
    stopping.has_next_stage = i < len(stages) - 1
    if not done.is_file():
      check_no_later_stages(stage.where, [later.where for later in stages[i + 1 :]])
      result = stage.fill(stopping, watchdog)
      if jax.process_index() == 0:
        write_atomically(done, json.dumps(result, indent=2) + '\n')
      wait_for_all(f'{name} done')
      jax.clear_caches()  # Programs of a stage that is over.
    results[name] = read_json_object(done)
    if jax.process_index() == 0:
      print_stderr(f'{name}: {format_metrics(results[name])}')
  return results


def plan_stages(
  teacher: Config | str, students: Sequence[Config], workdir: Path
) -> Iterator[TrainStage | LabelStage]:
  """In their order. UserError for a student without unlabelled images."""
  teaches = teacher
  if isinstance(teacher, Config):
    data = dataclasses.replace(teacher.data, **UNLABELLED_DEFAULTS)
    yield TrainStage(workdir / '0-teacher', validate(dataclasses.replace(teacher, data=data)))
    teaches = '0-teacher'
  for i, student in enumerate(students, start=1):
    if not student.data.unlabelled:
      raise UserError(f'student {i} has no unlabelled images: add --config.data.unlabelled=SOURCE')
    labels = workdir / f'{i}-labels'
    config = validate(
      dataclasses.replace(
        student, data=dataclasses.replace(student.data, pseudo_labels=str(labels))
      )
    )
    yield LabelStage(labels, teaches, config)
    teaches = f'{i}-student'
    yield TrainStage(workdir / teaches, config)


def check_no_later_stages(where: Path, later: Sequence[Path]):
  """UserError where what rests on a stage is there already, and the stage is not."""
  if there := [path for path in later if path.exists()]:
    raise UserError(
      f'{there[0]} rests on a {where.name} that is not there any more: remove it, or choose another --workdir'
    )
