"""Self-training with noisy students (arXiv 1911.04252).

A teacher labels images, a student learns from them, and the student is the next teacher.

    WORKDIR/0-teacher    a run on labelled images; absent if the teacher is an existing model
    WORKDIR/1-labels     the teacher's predictions, without noise, for the unlabelled images
    WORKDIR/1-student    a run on both kinds of images, with the noise of its config
    WORKDIR/2-labels     the predictions of 1-student, and so on

A stage starts when the stage before it is complete. A complete stage is not repeated.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from jax.experimental.multihost_utils import sync_global_devices

from vit_jax.checkpoint.run_directory import check_same_run, read_run_labels
from vit_jax.config import UNLABELLED_DEFAULTS, Config
from vit_jax.config_checks import validate
from vit_jax.data.pseudo_labels import check_same_pseudo_labels
from vit_jax.data.sources import open_source, open_unlabelled
from vit_jax.errors import UserError
from vit_jax.evaluate.pseudo_labelling import write_pseudo_labels
from vit_jax.metrics.records import format_metrics
from vit_jax.pretrained.loading import load
from vit_jax.runtime.cluster import print_on_first_host
from vit_jax.runtime.files import read_json_object, write_atomically
from vit_jax.runtime.preemption import Preemption
from vit_jax.runtime.watchdog import Watchdog

STAGE_RESULT_FILE = 'done.json'  # Written into a stage's directory when the stage is complete.
Train = Callable[..., dict[str, float]]  # `vit_jax.train.train`, which is a layer above this one.


@dataclasses.dataclass(frozen=True, slots=True)
class TrainStage:
  """A stage that is a training run."""

  workdir: Path
  config: Config

  def check_same(self):
    """Raise UserError if the directory holds another run; it names the settings that differ."""
    if (self.workdir / 'labels.txt').is_file():
      check_same_run(self.workdir, self.config, read_run_labels(self.workdir))

  def run(self, train: Train, preemption: Preemption, watchdog: Watchdog) -> dict[str, float]:
    """Train or resume, and return the last evaluation."""
    return train(self.config, self.workdir, preemption=preemption, watchdog=watchdog)


@dataclasses.dataclass(frozen=True, slots=True)
class LabelStage:
  """A stage that labels the unlabelled images of a student's config."""

  workdir: Path
  teacher: str  # What `load` takes, or the name of the stage that trains the teacher.
  config: Config

  @property
  def facts(self) -> dict[str, object]:
    """Return what identifies the labels: the teacher and the images."""
    data = self.config.data
    return {
      'teacher': self.teacher,
      'unlabelled': data.unlabelled,
      'unlabelled_split': data.unlabelled_split,
    }

  def check_same(self):
    """Raise UserError if the directory holds other labels; it names what differs."""
    check_same_pseudo_labels(self.workdir, self.facts)

  def run(self, train: Train, preemption: Preemption, watchdog: Watchdog) -> dict[str, int]:
    """Label the images that have no label yet, and return the number of images."""
    data, timeout = self.config.data, self.config.first_step_timeout
    watchdog.arm(timeout)
    stage = self.workdir.parent / self.teacher
    source = open_unlabelled(data.unlabelled, data.unlabelled_split, dir=data.dir)
    write_pseudo_labels(
      load(str(stage if stage.is_dir() else self.teacher)),
      source,
      self.workdir,
      classes=open_source(data.train, data.split, dir=data.dir).label_names,
      facts=self.facts,
      on_batch=lambda examples: watchdog.arm(timeout),
      batch=data.eval_batch or data.batch,
      **{name: getattr(data, name) for name in ('workers', 'threads', 'bad_images', 'max_pixels')},
    )
    return {'images': len(source)}


def self_train(
  teacher: Config | str,
  students: Sequence[Config],
  workdir: Path,
  *,
  train: Train,
  preemption: Preemption | None = None,
  watchdog: Watchdog | None = None,
) -> dict[str, dict]:
  """Run the stages that are not complete, and return {'0-teacher': {'test_accuracy': …}, …}.

  Args:
    teacher: the config of a run on labelled images, or a model as `load` takes it.
    students: a config for each generation.
    workdir: directory of the stages.
    train: `vit_jax.train.train`.
    preemption: asks the current run to save and exit with its exit code.
    watchdog: ends the process if a stage hangs.

  Raises:
    UserError: a config is wrong, or `workdir` holds other stages; before a device is used.
  """
  preemption, watchdog = preemption or Preemption(), watchdog or Watchdog()
  stages = [*plan_stages(teacher, students, workdir)]
  for stage in stages:
    stage.check_same()
  results = {}
  for i, stage in enumerate(stages):
    name, done = stage.workdir.name, stage.workdir / STAGE_RESULT_FILE
    preemption.has_next_stage = i < len(stages) - 1
    if not done.is_file():
      check_no_later_stages(stage.workdir, [later.workdir for later in stages[i + 1 :]])
      result = stage.run(train, preemption, watchdog)
      if jax.process_index() == 0:
        write_atomically(done, json.dumps(result, indent=2) + '\n')
      sync_global_devices(f'{name} done')
      jax.clear_caches()  # The next stage has other programs.
    results[name] = read_json_object(done)
    print_on_first_host(f'{name}: {format_metrics(results[name])}')
  return results


def plan_stages(
  teacher: Config | str, students: Sequence[Config], workdir: Path
) -> Iterator[TrainStage | LabelStage]:
  """Yield the stages in their order.

  Raises UserError for a student without unlabelled images.
  """
  current = teacher
  if isinstance(teacher, Config):
    data = dataclasses.replace(teacher.data, **UNLABELLED_DEFAULTS)
    yield TrainStage(workdir / '0-teacher', validate(dataclasses.replace(teacher, data=data)))
    current = '0-teacher'
  for i, student in enumerate(students, start=1):
    if not student.data.unlabelled:
      raise UserError(f'student {i} has no unlabelled images: add --config.data.unlabelled=SOURCE')
    labels = workdir / f'{i}-labels'
    data = dataclasses.replace(student.data, pseudo_labels=str(labels))
    config = validate(dataclasses.replace(student, data=data))
    yield LabelStage(labels, current, config)
    current = f'{i}-student'
    yield TrainStage(workdir / current, config)


def check_no_later_stages(stage: Path, later: Sequence[Path]):
  """Raise UserError if a stage that depends on the missing `stage` exists already."""
  if existing := [path for path in later if path.exists()]:
    raise UserError(
      f'{existing[0]} depends on {stage.name}, which is missing: '
      f'remove {existing[0]}, or choose another --workdir'
    )
