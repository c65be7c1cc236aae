"""Arguments of `launch` reach the command byte for byte, or are refused in one line.

No word is executed on the way: that would create a file PWNED.
"""

import dataclasses
import io
import re
import string
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.launch.hostile_words import HOSTILE
from tests.launch.machine import (
  JOB,
  Machine,
  parse_environ,
  split_at_nul,
  start_container,
)
from vit_jax.errors import UserError
from vit_jax.launch.bundle import make_start_files
from vit_jax.launch.environment import PACKED_NAME, parse_env
from vit_jax.launch.gke import WORKDIR_OPTIONS, create_commands
from vit_jax.launch.job import check_job, split_bucket_url
from vit_jax.launch.local import run_hosts
from vit_jax.launch.script import start_script
from vit_jax.launch.shell import quote_word

GKE = dataclasses.replace(JOB, backend='gke', cluster='tpus')
OPTIONS = ('project', 'zone', 'cluster', 'workdir', 'data', 'name')
# Names of the start script's own variables, and of some variables that bash itself reads.
SCRIPT_NAMES = ('launch', 'code', 'ended', 'environment', 'key', 'pause', 'HOSTNAME', 'IFS', 'LC_ALL', 'CDPATH', 'PS4')  # fmt: skip
DUMP = """
import os, sys
open(os.environ['DUMP'] + '.argv', 'wb').write(b''.join(os.fsencode(a) + b'\\0' for a in sys.argv[1:]))
open(os.environ['DUMP'] + '.environ', 'wb').write(open('/proc/self/environ', 'rb').read())
"""


def hostile_job(job, *, words=HOSTILE, names=()):
  """Return the job with these words as arguments and as values of variables."""
  env = {f'V{i}': word for i, word in enumerate(words)} | {
    name: words[i % len(words)] for i, name in enumerate(names)
  }
  return dataclasses.replace(job, command=('job.py', *words), env=job.env | env)


def pwned(folder: Path) -> list[Path]:
  return [path for path in folder.rglob('*') if 'PWNED' in path.name]


def bash_syntax_errors(script: str) -> str:
  done = subprocess.run(['bash', '-n'], input=script, text=True, capture_output=True, check=False)
  return done.stderr


def boot(place: Path, job) -> Machine:
  """Run the start script of a TPU VM, and check what its command received."""
  machine = Machine(place, job)
  done = machine.boot(0)
  assert done.wait(60) == 0, machine.lines('var/log/vit_jax.log')
  assert machine.exit_code() == '0'
  assert machine.argv() == list(job.command)
  assert job.env.items() <= machine.variables().items()
  assert not pwned(place)
  return machine


@pytest.fixture
def place(tmp_path, monkeypatch):
  """Return an empty folder, which is also the working directory."""
  (tmp_path / 'place').mkdir()
  monkeypatch.chdir(tmp_path / 'place')
  return tmp_path / 'place'


def test_the_command_on_a_tpu_vm_receives_every_argument_and_variable_to_the_byte(place):
  job = hostile_job(JOB, names=SCRIPT_NAMES)
  assert bash_syntax_errors(start_script(job)) == ''
  boot(place, job)


def test_each_word_alone_arrives_on_a_tpu_vm(place):
  for i, word in enumerate(HOSTILE):
    names = SCRIPT_NAMES if len(word) < 1000 else ()
    boot(place / str(i), hostile_job(JOB, words=(word,), names=names))


def test_the_command_on_gke_receives_every_argument_and_variable_to_the_byte(place):
  job = hostile_job(GKE, names=(*SCRIPT_NAMES, 'PATH'))
  assert bash_syntax_errors(start_script(job)) == ''
  argv, variables = start_container(place, job)
  assert not pwned(place)
  assert argv == list(job.command)
  assert job.env.items() <= variables.items()
  assert PACKED_NAME not in variables


def test_each_word_alone_arrives_on_gke(place):
  for i, word in enumerate(HOSTILE):
    job = hostile_job(GKE, words=(word,), names=SCRIPT_NAMES if len(word) < 1000 else ())
    argv, variables = start_container(place / str(i), job)
    assert not pwned(place)
    assert argv == list(job.command)
    assert job.env.items() <= variables.items()


def test_the_command_on_this_machine_receives_every_argument_and_variable_to_the_byte(place):
  (place / 'job.py').write_text(DUMP, encoding='utf-8')
  job = hostile_job(JOB, names=SCRIPT_NAMES)
  env = job.env | {'DUMP': str(place / 'got')}
  code = run_hosts(list(job.command), hosts=1, devices=0, out=io.StringIO(), env=env)
  assert code == 0
  assert split_at_nul((place / 'got.argv').read_bytes()) == list(job.command[1:])
  assert env.items() <= parse_environ((place / 'got.environ').read_bytes()).items()
  assert not pwned(place)


def test_a_script_is_ascii_with_one_line_for_each_word(place):
  job = hostile_job(JOB)
  script, plain = start_script(job), start_script(dataclasses.replace(JOB, env=job.env | dict.fromkeys(job.env, 'x')))  # fmt: skip
  assert script.isascii()
  assert script.count('\n') == plain.count('\n')
  assert not set(script) - set(string.printable.replace('\r\v\f\t', '')) - {'\n'}


def refused(job) -> bool:
  """Return True if a UserError refuses the job."""
  try:
    check_job(job)
  except UserError:
    return True
  return False


def accepted_jobs(job) -> list:
  """Return the jobs with a hostile word in one option that are not refused."""
  found = []
  for option in OPTIONS:
    for word in HOSTILE:
      texts = [word, f'{getattr(job, option)}{word}', f'{getattr(job, option)}/{word}']
      jobs = [dataclasses.replace(job, **{option: text}) for text in texts]
      found += [each for each in jobs if each != job and not refused(each)]
  return found


def test_words_that_xpk_would_execute_or_split_are_refused(place):
  """xpk puts its arguments into shell commands, and splits mount options at commas."""
  accepted = accepted_jobs(GKE)
  assert {each.workdir for each in accepted} >= {
    'gs://runs/b16/a@b',
    'gs://runs/b16/gr\u00fc\u00dfe',
  }
  for job in accepted:
    words = [word for command in create_commands(job, 'FILES') for word in command]
    plain = [word for word in words if word != '--command=bash start.sh']
    script = f"printf '%s\\0' {' '.join(plain)}"
    done = subprocess.run(['bash', '-c', script], capture_output=True, check=True)
    assert split_at_nul(done.stdout) == plain
    mounts = [word for word in words if word.startswith('--mount-options=')]
    folder = split_bucket_url(job.workdir)[1]
    options = mounts[0].removeprefix('--mount-options=').split(',')
    assert options == ['implicit-dirs', f'only-dir={folder}', *WORKDIR_OPTIONS]
    assert not re.search('[=:]', folder)
    assert yaml.safe_load(f'- only-dir={folder}\n') == [f'only-dir={folder}']
  assert not pwned(place)


@pytest.mark.parametrize(
  'word', ['a,only-dir=b', 'a,o=rw', 'a:b', 'a=b', 'a b', 'a\nb', '{a}', '#1']
)
@pytest.mark.parametrize('option', ['workdir', 'data'])
def test_a_path_on_gke_adds_no_mount_option(option, word):
  assert refused(dataclasses.replace(GKE, **{option: f'gs://runs/{word}'}))


@pytest.mark.parametrize(
  'word', ['a*', 'a?', '[a]', '{a,b}', 'a#1', 'a/../b', './a', 'a//b', "a'b"]
)
@pytest.mark.parametrize('option', ['workdir', 'data'])
def test_a_bucket_path_that_gcloud_reads_as_a_pattern_is_refused(option, word):
  assert refused(dataclasses.replace(JOB, **{option: f'gs://runs/{word}'}))


def test_a_bucket_path_with_equals_comma_and_colon_is_mounted_on_a_tpu_vm(place):
  job = dataclasses.replace(JOB, data='gs://sets/date=2024-01-01,v:2', command=('job.py',))
  check_job(job)
  machine = boot(place, job)
  assert '--only-dir=date=2024-01-01,v:2' in machine.argv('gcsfuse.argv')


def bash_names() -> list[str]:
  """Return the variables that bash computes or protects: other exported values do not arrive."""
  names = subprocess.run(['bash', '-c', 'compgen -v'], capture_output=True, text=True, check=True)
  more = 'RANDOM SECONDS LINENO FUNCNAME GROUPS DIRSTACK HISTCMD EPOCHSECONDS EPOCHREALTIME SRANDOM OPTIND UID PPID _'
  arrives = lambda name: subprocess.run(
    ['bash', '-c', f'export {name}="a b"; exec /usr/bin/env -0'], capture_output=True, check=False
  ).stdout.split(b'\0')
  return [
    name for name in sorted({*names.stdout.split(), *more.split()}) if f'{name}=a b'.encode() not in arrives(name)
  ]  # fmt: skip


def test_variables_that_belong_to_bash_are_refused():
  names = bash_names()
  assert {'UID', 'SHELLOPTS', 'RANDOM', '_'} <= set(names)
  for name in names:
    with pytest.raises(UserError, match=f'--env={name}=…: .*bash'):
      parse_env(f'{name}=a b')


@pytest.mark.parametrize(
  'name', ['', 'A-B', '1A', 'A B', 'A\nB', 'A$(touch PWNED)', 'gr\u00fc\u00dfe', "A'", ' A', 'A ']
)
def test_an_invalid_variable_name_is_refused(name):
  with pytest.raises(UserError, match='--env='):
    parse_env(f'{name}=value')


def test_a_quoted_word_is_one_line_that_bash_reads_back():
  quoted = [quote_word(word) for word in HOSTILE]
  assert all(line.isascii() and line.isprintable() for line in quoted)
  script = f"printf '%s\\0' {' '.join(quoted)}"
  for locale in ('C', 'C.UTF-8'):
    done = subprocess.run(['bash'], input=script.encode(), env={'LC_ALL': locale}, capture_output=True, check=True)  # fmt: skip
    assert split_at_nul(done.stdout) == list(HOSTILE)


def test_a_script_or_environment_above_the_clouds_limit_is_refused_before_anything_is_created():
  long = ('x' * 100_000,) * 3
  with pytest.raises(UserError, match='start script has'):
    make_start_files(dataclasses.replace(JOB, command=('job.py', *long)))
  with pytest.raises(UserError, match='values of --env are'):
    make_start_files(dataclasses.replace(GKE, env={'A': 'x' * 100_000}))
