"""Manage a launched job by its name: status, logs, watch, stop, delete."""

import argparse
import sys
import time

from vit_jax.errors import UserError
from vit_jax.launch.bundle import launch_folder, write_start_files
from vit_jax.launch.job import Job, delete_saved_job, load_job
from vit_jax.launch.logs import LogFollower
from vit_jax.launch.shell import join_words
from vit_jax.launch.states import NOT_FOUND, find_problem
from vit_jax.launch.watch import (
  BACKENDS,
  Babysitter,
  PollSchedule,
  format_cloud_error,
  run_cloud_command,
)
from vit_jax.runtime.screen import print_stderr

JOB_VERBS = {
  'status': 'Print the state of a job.',
  'logs': 'Follow the logs of all hosts.',
  'watch': 'Watch a job again, and recreate it after a preemption.',
  'stop': 'Stop the run and keep the machines.',
  'delete': 'Delete the machines and keep the workdir. Asks first.',
}


def watch_until_interrupted(babysitter, *, create: bool) -> int:
  """Watch until the job ends. Ctrl-C only stops watching."""
  try:
    return babysitter.watch(create=create)
  except KeyboardInterrupt:
    name = babysitter.job.name
    print_stderr(f'{name} keeps running unwatched: `launch watch {name}`, `launch delete {name}`')
    return 130


def run_verb(verb: str, args: argparse.Namespace) -> int:
  """Run a verb on a job and return the exit code."""
  job = load_job(args.name)
  return {
    'status': show_status,
    'logs': follow_logs,
    'watch': resume_watching,
    'stop': stop_job,
    'delete': delete_job,
  }[verb](job, args)


def show_status(job: Job, _) -> int:
  """Print the job and its state in the cloud."""
  done = run_cloud_command(BACKENDS[job.backend].describe_command(job))
  if done.returncode and not NOT_FOUND.search(done.stderr):
    raise UserError(format_cloud_error(job, find_problem(done.stderr), done.stderr))
  state = BACKENDS[job.backend].parse_state(done.stdout) if not done.returncode else None
  what = f'{job.slices} x {job.tpu}{" spot" if job.spot else ""} ({job.backend}, {job.zone})'
  print(
    f'{job.name}  {f"{state.cloud_state} {state.reason}".strip() if state else "gone"}  {what}  '
    f'{job.workdir}  commit {job.commit}'
  )
  print(f'  python {join_words(job.command)}')
  return 0 if state else 1


def follow_logs(job: Job, _) -> int:
  """Follow the logs until Ctrl-C, or until all log commands have ended."""
  follower = LogFollower(sys.stdout)
  for name, command in BACKENDS[job.backend].log_commands(job, {}).items():
    follower.start(name, command)
  try:
    while None in follower.exit_codes().values():
      time.sleep(0.2)
  except KeyboardInterrupt:
    return 130
  finally:
    follower.terminate()
  return max(code or 0 for code in follower.exit_codes().values())


def resume_watching(job: Job, _) -> int:
  """Watch a job as `launch` does after it has created one."""

  if job.backend == 'gke':
    raise UserError(f'JobSet restarts {job.name}: `launch logs {job.name}` follows it')
  with launch_folder() as files:
    write_start_files(job, files)
    return watch_until_interrupted(Babysitter(job, files, schedule=PollSchedule()), create=False)


def stop_job(job: Job, _) -> int:
  """Stop the run. Its machines stay and cost money."""
  run_commands(job, BACKENDS[job.backend].stop_commands(job))
  print_stderr(
    f'{job.name} is stopped; its machines still exist and cost money: `launch delete {job.name}` '
    'deletes them'
  )
  return 0


def delete_job(job: Job, args) -> int:
  """Delete the machines of a job, after a confirmation."""
  if not args.yes:
    if not sys.stdin.isatty():
      raise UserError(f'delete {job.name}: give --yes where there is no terminal to confirm')
    if (
      input(f'delete {job.slices} x {job.tpu} of {job.name} ({job.workdir} is kept)? [y/N] ')
      .strip()
      .lower()
      != 'y'
    ):
      print_stderr('nothing was deleted')
      return 1
  run_commands(job, BACKENDS[job.backend].delete_commands(job))
  delete_saved_job(job)
  print_stderr(f'{job.name} is deleted; {job.workdir} is kept')
  return 0


def run_commands(job: Job, commands: list[list[str]]):
  """Run commands. Raises UserError if one fails, unless its target does not exist any more."""
  for command in commands:
    done = run_cloud_command(command)
    if done.returncode and not NOT_FOUND.search(done.stderr):
      raise UserError(format_cloud_error(job, find_problem(done.stderr), done.stderr))
