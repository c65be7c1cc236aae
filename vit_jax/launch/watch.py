"""The babysitter: creates a job, follows its hosts' logs, and creates it again when its machines are taken away."""

import dataclasses
import subprocess
import sys
import time
from types import ModuleType

from vit_jax.errors import EXIT_RESTART, EXIT_SUCCESS, RESTARTABLE_EXIT_CODES, UserError
from vit_jax.launch import gke, queued, tpu_vm
from vit_jax.launch.job import Job
from vit_jax.launch.logs import Followed
from vit_jax.launch.states import GONE, State, Trouble, trouble

BACKENDS: dict[str, ModuleType] = {'tpu-vm': tpu_vm, 'queued': queued, 'gke': gke}
CONFIRM = 3  # Polls that a failed exit code has to outlast: hosts fail before the cloud says that one was taken away.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
  """Seconds."""

  poll: float = 30
  first: float = 60  # Before the first new try, and twice as long before each that follows a try which came to nothing.
  longest: float = 1800


class Babysitter:
  """Of one job. `files` is the folder that start.sh is in."""

  def __init__(self, job: Job, files: str, *, pace: Pace):
    self.job, self.files, self.pace, self.backend = job, files, pace, BACKENDS[job.backend]
    self.followed, self.tries, self.failing, self.made = Followed(sys.stdout), 0, 0, 0

  def watch(self, *, create: bool) -> int:
    """Until the run has ended: 0, or the exit code that it failed with. UserError where trying again can't help."""
    if create:
      self.create()
    said = None
    try:
      while True:
        state = self.state()
        if state != said:
          say(self.job, f'{state.word}{f": {first_line(state.why)}" if state.why else ""}')
          said = state
        ended = self.step(state)
        if ended is not None:
          return ended
        time.sleep(self.pace.poll)
    finally:
      self.followed.end()

  def step(self, state: State) -> int | None:
    """Does what a state asks for; an exit code where that is the end."""
    if state.kind == 'lost':
      self.again(state)
    elif state.kind == 'done':
      return 0
    elif state.kind == 'failed':
      raise UserError(
        f'{self.job.name} failed: {state.why}. `kubectl describe jobset {self.job.name}` says more'
      )
    elif state.kind == 'active':
      self.tries = 0
      self.follow()
      return self.ended()
    return None

  def create(self):
    """Until it is created: a zone that has none left is asked again."""
    commands = self.backend.create(self.job, self.files)
    while self.made < len(commands):
      done = call(commands[self.made])
      if done.returncode:
        self.pause(known(self.job, done))
      else:
        self.made += 1
    say(self.job, 'created')

  def again(self, state: State):
    """Removes what is left of it and creates it anew; the run goes on from its last checkpoint."""
    self.followed.end()
    self.followed = Followed(sys.stdout)
    found = trouble(state.why)
    if found and not found.again:
      raise UserError(explain(self.job, found, state.why))
    for command in [*self.backend.delete(self.job), forget_exits(self.job)]:
      call(command)  # It may be gone already.
    self.made = 0
    self.pause(
      found
      or Trouble(f'it was {state.word.lower()}', True, 'the run goes on from its last checkpoint')
    )
    self.create()

  def pause(self, found: Trouble):
    """Waits longer each time."""
    seconds = min(self.pace.first * 2**self.tries, self.pace.longest)
    self.tries += 1
    say(self.job, f'{found.what}: trying again in {seconds:g} s ({found.remedy})')
    time.sleep(seconds)

  def follow(self):
    """Follows the logs of the hosts that are not followed (any more)."""
    codes = self.followed.codes()
    for name, command in self.backend.logs(self.job, self.followed.seen).items():
      if name not in codes or codes[name] is not None:
        self.followed.start(name, command)

  def ended(self) -> int | None:
    """The exit code of the run, when all its hosts have one; None while it goes on. Of GKE, the JobSet's state tells."""
    if self.job.backend == 'gke':
      return None
    codes = [int(word) for word in call(read_exits(self.job)).stdout.split() if word.isdecimal()]
    failed = [code for code in codes if code not in (EXIT_SUCCESS, *RESTARTABLE_EXIT_CODES)]
    hosts = self.job.accelerator.hosts * self.job.slices
    if len(codes) == hosts and not any(codes):
      say(self.job, f'done on {hosts} hosts; removing the machines')
      for command in self.backend.delete(self.job):
        call(command)
      return 0
    if (
      len(codes) == hosts and not failed
    ):  # Hosts are started again after this code, but for a stop.
      say(self.job, f'stopped on {hosts} hosts. The machines are still there, and paid for')
      say(self.job, f'`launch delete {self.job.name}` removes them')
      return EXIT_RESTART
    self.failing = self.failing + 1 if failed else 0
    if self.failing < CONFIRM:
      return None
    say(
      self.job,
      f'{len(failed)} of {hosts} hosts failed, exit code {failed[0]}. The machines are still there, and paid for',
    )
    say(
      self.job,
      f'`launch logs {self.job.name}` shows why, `launch delete {self.job.name}` removes them',
    )
    return failed[0]

  def state(self) -> State:
    """What the cloud says of it now. UserError where it is gone, or we may not know."""
    while True:
      done = call(self.backend.describe(self.job))
      if not done.returncode:
        return self.backend.read(done.stdout)
      if GONE.search(done.stderr):
        raise UserError(
          f'{self.job.name} is gone: somebody deleted it. The same `launch` goes on from its last checkpoint'
        )
      self.pause(known(self.job, done))


def call(command: list[str]) -> subprocess.CompletedProcess:
  """Runs a command of the cloud's. UserError where it is not installed."""
  try:
    return subprocess.run(
      command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
  except FileNotFoundError:
    raise UserError(
      f'{command[0]} is not installed here, or not on PATH{INSTALL.get(command[0], "")}'
    ) from None


INSTALL = {
  'gcloud': ': https://cloud.google.com/sdk/docs/install', 'xpk': ': `pip install xpk`',
  'kubectl': ': `gcloud components install kubectl`',
}  # fmt: skip


def known(job: Job, done: subprocess.CompletedProcess) -> Trouble:
  """The trouble that a failed command speaks of, where trying again helps. UserError otherwise."""
  message = done.stderr or done.stdout
  found = trouble(message)
  if found is None or not found.again:
    raise UserError(explain(job, found, message))
  return found


def explain(job: Job, found: Trouble | None, message: str) -> str:
  """An error in one line: what it is, what the cloud said, what to do."""
  text = first_line(message)
  return (
    f'{job.name}: {found.what}: {found.remedy}. It was said: {text}'
    if found
    else f'{job.name}: {text}'
  )


def first_line(message: str) -> str:
  """What an error message begins with."""
  return next((line.strip() for line in message.splitlines() if line.strip()), 'no reason given')[
    :300
  ]


def read_exits(job: Job) -> list[str]:
  """The command that prints the exit codes of the hosts that have ended, a line each."""
  return ['gcloud', 'storage', 'cat', f'{job.launch_dir}/exit/*']


def forget_exits(job: Job) -> list[str]:
  """The command that removes them."""
  return ['gcloud', 'storage', 'rm', f'{job.launch_dir}/exit/*']


def say(job: Job, text: str):
  """A line for the person, with the time: a job takes days."""
  print(f'{time.strftime("%d %b %H:%M:%S")}  {job.name}  {text}', file=sys.stderr, flush=True)
