"""launch status, logs, watch, stop and delete: what is done to a job that was launched from here."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from vit_jax.cloud.followed import Followed
from vit_jax.cloud.job import Job, forget, recall
from vit_jax.cloud.script import machine_script
from vit_jax.cloud.states import GONE, trouble
from vit_jax.cloud.watch import BACKENDS, Babysitter, Pace, call, explain
from vit_jax.commands.results import say
from vit_jax.errors import UserError


def act(verb: str, args: argparse.Namespace) -> int:
  """Does it; the exit code."""
  job = recall(args.name)
  return {'status': status, 'logs': logs, 'watch': watch, 'stop': stop, 'delete': delete}[verb](job, args)


def status(job: Job, _) -> int:
  """Prints what it is and what the cloud says of it."""
  done = call(BACKENDS[job.backend].describe(job))
  if done.returncode and not GONE.search(done.stderr):
    raise UserError(explain(job, trouble(done.stderr), done.stderr))
  state = BACKENDS[job.backend].read(done.stdout) if not done.returncode else None
  what = f'{job.slices} x {job.tpu}{" spot" if job.spot else ""} ({job.backend}, {job.zone})'
  print(f'{job.name}  {f"{state.word} {state.why}".strip() if state else "gone"}  {what}  {job.workdir}  commit {job.commit}')
  print(f'  python {" ".join(job.command)}')
  return 0 if state else 1


def logs(job: Job, _) -> int:
  """Until Ctrl-C, or until nothing follows any more."""
  followed = Followed(sys.stdout)
  for name, command in BACKENDS[job.backend].logs(job, {}).items():
    followed.start(name, command)
  try:
    while None in followed.codes().values():
      time.sleep(0.2)
  except KeyboardInterrupt:
    return 130
  finally:
    followed.end()
  return max(code or 0 for code in followed.codes().values())


def watch(job: Job, _) -> int:
  """As `launch` itself does when it has created it."""
  from vit_jax.commands.launch import interruptible

  if job.backend == 'gke':
    raise UserError(f'JobSet itself starts {job.name} again: `launch logs {job.name}` follows it')
  with tempfile.TemporaryDirectory(prefix='vit_jax-') as files:
    (Path(files) / 'start.sh').write_text(machine_script(job))
    return interruptible(Babysitter(job, files, pace=Pace()), create=False)


def stop(job: Job, _) -> int:
  """The machines stay, and are paid for."""
  each(job, BACKENDS[job.backend].stop(job))
  say(f'{job.name} is stopped; its machines are still there, and paid for: `launch delete {job.name}` removes them')
  return 0


def delete(job: Job, args) -> int:
  """Asks first."""
  if not args.yes:
    if not sys.stdin.isatty():
      raise UserError(f'delete {job.name}: --yes where nobody can be asked')
    if input(f'remove {job.slices} x {job.tpu} of {job.name} ({job.workdir} stays)? [y/N] ').strip().lower() != 'y':
      say('nothing was removed')
      return 1
  each(job, BACKENDS[job.backend].delete(job))
  forget(job)
  say(f'{job.name} is removed; {job.workdir} stays')
  return 0


def each(job: Job, commands: list[list[str]]):
  """Runs them. UserError where one fails, unless what it is about is gone."""
  for command in commands:
    done = call(command)
    if done.returncode and not GONE.search(done.stderr):
      raise UserError(explain(job, trouble(done.stderr), done.stderr))
