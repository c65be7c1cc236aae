"""Experiment trackers: Weights & Biases and MLflow get the numbers of metrics.jsonl.

Where they store a run, and under which account and project, is set as their documentation says, by
WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on. A file in the run
directory holds the identity of the run there, so that a run that is resumed continues it.
"""

import importlib.util
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vit_jax.errors import UserError, check_installed
from vit_jax.metrics.background import BackgroundWriter
from vit_jax.runtime.files import read_text_file, write_atomically

PROJECT = 'vit-jax'  # The default project of W&B and experiment of MLflow.
_MLFLOW_BATCH = 1000, 100  # The largest numbers of metrics and of parameters in a request.
_MAX_PARAM = 500  # Characters of a parameter in MLflow 1 and 2.
_FINISH_TIMEOUT = 8.0  # Seconds that W&B may upload at the end. `wandb sync` uploads the rest.


class Numbers(NamedTuple):
  """The numbers of a record of metrics.jsonl."""

  step: int
  milliseconds: int  # Since 1970.
  values: dict[str, float]


class Tracker(Protocol):
  """A run at a tracker. Only the thread of its BackgroundWriter calls it."""

  def log(self, records: list[Numbers]):
    """Pass records on, and raise an exception if that fails."""

  def finish(self):
    """Declare that this start of the run has ended."""


class WandbRun:
  """A run at Weights & Biases. Its files are in WORKDIR/wandb, unless WANDB_DIR is set."""

  def __init__(self, workdir: Path, config: dict[str, object]):
    import wandb

    settings = wandb.Settings(
      console='off', silent=True, disable_git=True, finish_timeout=_FINISH_TIMEOUT
    )
    offline = os.environ.get('WANDB_MODE') == 'offline'
    self._run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', PROJECT),
      name=os.environ.get('WANDB_NAME', workdir.resolve().name),
      id=run_identity(workdir / 'wandb.id', lambda: uuid.uuid4().hex[:12]),
      resume=None if offline else 'allow',  # It cannot look the run up, and would warn.
      dir=os.environ.get('WANDB_DIR', str(workdir)),
      settings=settings,
    )
    self._run.config.update(config, allow_val_change=True)
    # Not W&B's own step, which never falls: a start may repeat steps of the one before.
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def log(self, records: list[Numbers]):
    """Log each record with its step."""
    for record in records:
      self._run.log({'step': record.step} | record.values)

  def finish(self):
    """Upload what is left. The run is resumed under the same ID."""
    self._run.finish()


class MlflowRun:
  """A run at MLflow, in the store that MLFLOW_TRACKING_URI names."""

  def __init__(self, workdir: Path, config: dict[str, object]):
    from mlflow import MlflowClient
    from mlflow.entities import Param

    self._client = MlflowClient()
    self._id = run_identity(workdir / 'mlflow.id', lambda: self._create(workdir.resolve().name))
    self._client.update_run(self._id, status='RUNNING')
    recorded = self._client.get_run(self._id).data.params  # They cannot change.
    params = [
      Param(name, str(value)[:_MAX_PARAM] or "''")
      for name, value in config.items()
      if name not in recorded
    ]
    limit = _MLFLOW_BATCH[1]
    for i in range(0, len(params), limit):
      self._client.log_batch(self._id, params=params[i : i + limit])

  def _create(self, name: str) -> str:
    experiment = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
    known = self._client.get_experiment_by_name(experiment)
    where = known.experiment_id if known else self._client.create_experiment(experiment)
    return self._client.create_run(where, run_name=name).info.run_id

  def log(self, records: list[Numbers]):
    """Log the values with their steps and times."""
    from mlflow.entities import Metric

    metrics = [
      Metric(name, value, record.milliseconds, record.step)
      for record in records
      for name, value in record.values.items()
    ]
    limit = _MLFLOW_BATCH[0]
    for i in range(0, len(metrics), limit):
      self._client.log_batch(self._id, metrics=metrics[i : i + limit])

  def finish(self):
    """Mark the run as finished. The next start marks it as running."""
    self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[Path, dict[str, object]], Tracker]] = {
  'wandb': WandbRun,
  'mlflow': MlflowRun,
}


def run_identity(path: Path, create: Callable[[], str]) -> str:
  """Return the identity of the run that a file holds, or create both."""
  if path.is_file():
    return read_text_file(path).strip()
  identity = create()
  write_atomically(path, identity + '\n')
  return identity


class TrackerWriter:
  """Passes records to a tracker in a thread. Its errors never delay nor end the run."""

  def __init__(
    self, name: str, workdir: Path, config: dict[str, object], report: Callable[[str], None]
  ):
    self._open = lambda: TRACKERS[name](workdir, config)
    self._tracker: Tracker | None = None
    self._records = BackgroundWriter(name, self._write, report)

  def put(self, step: int, values: dict[str, float]):
    """Add the numbers of a record. This waits for nothing."""
    self._records.put(Numbers(step, time.time_ns() // 1_000_000, values))

  def close(self):
    """Pass on what is left, and end the run at the tracker; a second call does nothing."""
    self._records.put(None)
    self._records.close()

  def _write(self, items: list[Numbers | None]):
    if records := [item for item in items if item is not None]:
      # Opened here, because it takes seconds. If it fails, the next attempt tries again.
      self._tracker = self._tracker or self._open()
      self._tracker.log(records)
    if None in items and self._tracker:
      self._tracker.finish()


def check_trackers(names: tuple[str, ...], env: dict[str, str] | Any = os.environ):
  """Raise UserError for a tracker whose package is missing, or that has no place for the run."""
  modules = {'wandb': 'wandb', 'mlflow': 'mlflow'}
  for name in names:
    check_installed(f"config.writers='{name}'", 'writers', modules[name])
  has_database = importlib.util.find_spec('sqlalchemy') is not None  # Not with mlflow-skinny.
  if 'mlflow' in names and 'MLFLOW_TRACKING_URI' not in env and not has_database:
    raise UserError(
      "config.writers='mlflow' has no place for the run: set MLFLOW_TRACKING_URI, such as "
      'http://localhost:5000, or `pip install mlflow`, which keeps runs in mlflow.db'
    )
  if 'wandb' in names and sys.stdin and sys.stdin.isatty() and not _has_wandb_account(env):
    raise UserError(
      "config.writers='wandb' has no account: run `wandb login`, or set WANDB_API_KEY or "
      'WANDB_MODE=offline'
    )


def _has_wandb_account(env: dict[str, str] | Any) -> bool:
  """Return whether W&B needs no login. Without one, it prompts on the terminal, from a thread."""
  if env.get('WANDB_MODE', 'online') != 'online':
    return True
  if 'WANDB_API_KEY' in env or 'WANDB_IDENTITY_TOKEN_FILE' in env:
    return True
  try:
    hosts = netrc.netrc(env.get('NETRC')).hosts
  except (OSError, netrc.NetrcParseError):
    return False
  server = env.get('WANDB_BASE_URL', 'https://api.wandb.ai')
  return any(host in server or 'wandb' in host or 'coreweave' in host for host in hosts)
