"""The babysitter: creates a job, prints its logs, and creates it again after a preemption."""

import dataclasses
import subprocess
import sys
import time
from types import ModuleType

from vit_jax.errors import EXIT_RESTART, EXIT_SUCCESS, RESTARTABLE_EXIT_CODES, UserError
from vit_jax.launch import gke, queued, tpu_vm
from vit_jax.launch.job import Job
from vit_jax.launch.logs import LogFollower
from vit_jax.launch.states import NOT_FOUND, CloudProblem, JobState, find_problem

BACKENDS: dict[str, ModuleType] = {'tpu-vm': tpu_vm, 'queued': queued, 'gke': gke}
FAILURE_POLLS = (
  3  # Polls before a failed exit code counts: hosts fail before the cloud reports a preemption.
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PollSchedule:
  """Waiting times in seconds."""

  poll: float = 30
  first: float = 60  # Before the first retry. Doubled before each further one.
  longest: float = 1800


class Babysitter:
  """Watches one job. `files` is the folder that contains start.sh."""

  def __init__(self, job: Job, files: str, *, schedule: PollSchedule):
    self.job, self.files, self.schedule, self.backend = job, files, schedule, BACKENDS[job.backend]
    self.follower, self.retries, self.failed_polls, self.created = LogFollower(sys.stdout), 0, 0, 0

  def watch(self, *, create: bool) -> int:
    """Watch until the run ends. Return 0, or the exit code with which it failed.

    Raises UserError if trying again cannot help.
    """
    if create:
      self.create()
    printed = None
    try:
      while True:
        state = self.query_state()
        if state != printed:
          print_job_line(
            self.job,
            f'{state.cloud_state}{f": {first_line(state.reason)}" if state.reason else ""}',
          )
          printed = state
        exit_code = self.handle(state)
        if exit_code is not None:
          return exit_code
        time.sleep(self.schedule.poll)
    finally:
      self.follower.terminate()

  def handle(self, state: JobState) -> int | None:
    """Do what a state requires. Return the exit code if the job has ended."""
    if state.kind == 'lost':
      self.recreate(state)
    elif state.kind == 'done':
      return 0
    elif state.kind == 'failed':
      raise UserError(
        f'{self.job.name} failed: {state.reason}. `kubectl describe jobset {self.job.name}` has '
        'details'
      )
    elif state.kind == 'active':
      self.retries = 0
      self.follow_logs()
      return self.exit_code()
    return None

  def create(self):
    """Create the job, and try again while the zone has no capacity."""
    commands = self.backend.create_commands(self.job, self.files)
    while self.created < len(commands):
      done = run_cloud_command(commands[self.created])
      if done.returncode:
        self.wait_before_retry(check_retryable(self.job, done))
      else:
        self.created += 1
    print_job_line(self.job, 'created')

  def recreate(self, state: JobState):
    """Delete what is left of the job and create it again.

    The run resumes from its last checkpoint.
    """
    self.follower.terminate()
    self.follower = LogFollower(sys.stdout)
    problem = find_problem(state.reason)
    if problem and not problem.retry:
      raise UserError(format_cloud_error(self.job, problem, state.reason))
    for command in [*self.backend.delete_commands(self.job), clear_exit_codes_command(self.job)]:
      run_cloud_command(command)  # The job may be deleted already.
    self.created = 0
    self.wait_before_retry(
      problem
      or CloudProblem(
        f'it was {state.cloud_state.lower()}', True, 'the run resumes from its last checkpoint'
      )
    )
    self.create()

  def wait_before_retry(self, problem: CloudProblem):
    """Wait, twice as long as before the previous retry."""
    seconds = min(self.schedule.first * 2**self.retries, self.schedule.longest)
    self.retries += 1
    print_job_line(self.job, f'{problem.summary}: trying again in {seconds:g} s ({problem.remedy})')
    time.sleep(seconds)

  def follow_logs(self):
    """Follow the logs of hosts that are not, or no longer, followed."""
    codes = self.follower.exit_codes()
    for name, command in self.backend.log_commands(self.job, self.follower.lines_seen).items():
      if name not in codes or codes[name] is not None:
        self.follower.start(name, command)

  def exit_code(self) -> int | None:
    """Return the exit code of the run once all hosts have one, else None.

    On GKE the state of the JobSet decides.
    """
    if self.job.backend == 'gke':
      return None
    codes = [
      int(word)
      for word in run_cloud_command(exit_codes_command(self.job)).stdout.split()
      if word.isdecimal()
    ]
    failed = [code for code in codes if code not in (EXIT_SUCCESS, *RESTARTABLE_EXIT_CODES)]
    hosts = self.job.accelerator.hosts * self.job.slices
    if len(codes) == hosts and not any(codes):
      print_job_line(self.job, f'done on {hosts} hosts; removing the machines')
      for command in self.backend.delete_commands(self.job):
        run_cloud_command(command)
      return 0
    if (
      len(codes) == hosts and not failed
    ):  # After this code hosts restart by themselves, except after `launch stop`.
      print_job_line(self.job, f'stopped on {hosts} hosts. The machines still exist and cost money')
      print_job_line(self.job, f'`launch delete {self.job.name}` removes them')
      return EXIT_RESTART
    self.failed_polls = self.failed_polls + 1 if failed else 0
    if self.failed_polls < FAILURE_POLLS:
      return None
    print_job_line(
      self.job,
      f'{len(failed)} of {hosts} hosts failed, exit code {failed[0]}. The machines still exist '
      'and cost money',
    )
    print_job_line(
      self.job,
      f'`launch logs {self.job.name}` shows why, `launch delete {self.job.name}` removes them',
    )
    return failed[0]

  def query_state(self) -> JobState:
    """Return the state of the job in the cloud.

    Raises UserError if it is gone or may not be queried.
    """
    while True:
      done = run_cloud_command(self.backend.describe_command(self.job))
      if not done.returncode:
        return self.backend.parse_state(done.stdout)
      if NOT_FOUND.search(done.stderr):
        raise UserError(
          f'{self.job.name} does not exist any more. The same `launch` command resumes from its '
          'last checkpoint'
        )
      self.wait_before_retry(check_retryable(self.job, done))


def run_cloud_command(command: list[str]) -> subprocess.CompletedProcess:
  """Run gcloud, xpk or kubectl. Raises UserError if it is not installed."""
  try:
    return subprocess.run(
      command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
  except FileNotFoundError:
    raise UserError(
      f'{command[0]} is not installed, or not on PATH{INSTALL_HINTS.get(command[0], "")}'
    ) from None


INSTALL_HINTS = {
  'gcloud': ': https://cloud.google.com/sdk/docs/install', 'xpk': ': `pip install xpk`',
  'kubectl': ': `gcloud components install kubectl`',
}  # fmt: skip


def check_retryable(job: Job, done: subprocess.CompletedProcess) -> CloudProblem:
  """Return the problem of a failed command. Raises UserError if a retry cannot solve it."""
  message = done.stderr or done.stdout
  problem = find_problem(message)
  if problem is None or not problem.retry:
    raise UserError(format_cloud_error(job, problem, message))
  return problem


def format_cloud_error(job: Job, problem: CloudProblem | None, message: str) -> str:
  """Format an error in one line: the problem, the remedy, and the message of the cloud."""
  text = first_line(message)
  return (
    f'{job.name}: {problem.summary}: {problem.remedy}. The message was: {text}'
    if problem
    else f'{job.name}: {text}'
  )


def first_line(message: str) -> str:
  """Return the first line of an error message, at most 300 characters."""
  return next((line.strip() for line in message.splitlines() if line.strip()), 'no message')[:300]


def exit_codes_command(job: Job) -> list[str]:
  """Return the command that prints the exit codes of the hosts that have ended, one a line."""
  return ['gcloud', 'storage', 'cat', f'{job.launch_dir}/exit/*']


def clear_exit_codes_command(job: Job) -> list[str]:
  """Return the command that removes these exit codes."""
  return ['gcloud', 'storage', 'rm', f'{job.launch_dir}/exit/*']


def print_job_line(job: Job, text: str):
  """Print a line to standard error with date and time, since a job takes days."""
  print(f'{time.strftime("%d %b %H:%M:%S")}  {job.name}  {text}', file=sys.stderr, flush=True)
