"""Only the user can read the values of `launch --env` and the token of a run."""

import base64
import dataclasses
import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from tests.launch.machine import JOB, Machine, parse_environ, split_at_nul, start_container
from vit_jax.launch import bundle
from vit_jax.launch.job import load_job, save_job
from vit_jax.runtime.files import user_cache_dir, write_atomically

SECRET = 'hunter2 $(touch PWNED) 73f1'
WHERE = ('--zone=us-west4-a', '--workdir=gs://runs/b16', '--name=b16')
BACKENDS = {
  'local': ('--backend=local', '--hosts=2'),
  'tpu-vm': ('--backend=tpu-vm', '--tpu=v6e-8', *WHERE),
  'queued': ('--backend=queued', '--tpu=v5litepod-16', '--slices=2', *WHERE),
  'gke': ('--backend=gke', '--tpu=v5litepod-16', '--cluster=tpus', *WHERE),
}
CLOUDS = [name for name in BACKENDS if name != 'local']
ENV = (f'--env=GIVEN={SECRET}', '--env=TAKEN')


def mode(path) -> int:
  return stat.S_IMODE(Path(path).stat().st_mode)


@pytest.fixture
def open_umask():
  """Set a umask that removes no permission."""
  before = os.umask(0)
  yield
  os.umask(before)


@pytest.fixture(autouse=True)
def taken(monkeypatch):
  monkeypatch.setenv('TAKEN', SECRET)


def leaks(text: str) -> bool:
  """Return True if a text has the secret, in clear or in base64 at any of its three offsets."""
  coded = [base64.b64encode(b' ' * i + SECRET.encode()).decode()[4:-4] for i in range(3)]
  return any(part in text for part in ('hunter2', '73f1', *coded))


def played(cloud):
  """Let a run succeed on each backend."""
  cloud.play(
    describe=[[0, json.dumps({'state': {'state': 'ACTIVE'}}), '']],
    vm=[[0, json.dumps({'state': 'READY'}), '']],
    exits=[[0, '0\n' * 8, ''], [0, '0\n', '']],
    jobset=[[0, '{"status": {"conditions": [{"type": "Completed", "status": "True"}]}}', '']],
  )


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_dry_run_shows_no_value(checkout, cloud, run, backend):
  cloud.play()
  code, out, err = run('launch', *BACKENDS[backend], *ENV, '--dry_run', '--', 'job.py')
  assert code == 0
  assert not leaks(out + err)
  assert all(name in out and name in err for name in ('GIVEN', 'TAKEN'))


@pytest.mark.parametrize('backend', CLOUDS)
def test_no_value_is_in_a_command_a_message_or_a_file_that_others_can_read(
  checkout, cloud, run, open_umask, backend
):
  """The stand-ins refuse files with values if other users can read them."""
  played(cloud)
  code, out, err = run('launch', *BACKENDS[backend], *ENV, '--poll=0.01', '--', 'job.py')
  assert code == 0, err
  assert cloud.calls('create')
  token = load_job('b16').env['VIT_JAX_RUN_TOKEN']
  assert re.fullmatch('[0-9a-f]{32}', token)
  seen = out + err + json.dumps(cloud.calls())
  code, status, _ = run('launch', 'status', 'b16')
  assert not leaks(seen + status)
  assert token not in seen + status


def test_the_saved_job_is_private_from_its_first_byte_on(cloud, open_umask, monkeypatch):
  folder, opened, real = user_cache_dir('jobs'), [], os.open
  folder.mkdir(parents=True)
  (folder / '.b16.json.part').write_text('left by a crash', encoding='utf-8')
  assert mode(folder / '.b16.json.part') == 0o666

  def note(path, flags, mode=0o777, **kwargs):
    number = real(path, flags, mode, **kwargs)
    opened.append((str(path), stat.S_IMODE(os.fstat(number).st_mode)))
    return number

  monkeypatch.setattr(os, 'open', note)
  save_job(JOB)
  assert opened == [(str(folder / '.b16.json.part'), 0o600)]
  assert mode(folder / 'b16.json') == 0o600
  assert load_job('b16') == JOB


def test_the_saved_job_of_an_earlier_version_becomes_private_when_it_is_read(cloud):
  save_job(JOB)
  path = user_cache_dir('jobs') / 'b16.json'
  path.chmod(0o644)
  load_job('b16')
  assert mode(path) == 0o600


def test_other_files_have_the_mode_of_the_umask(tmp_path, open_umask):
  write_atomically(tmp_path / 'x.json', '{}')
  assert mode(tmp_path / 'x.json') == 0o666


@pytest.mark.parametrize('backend', ['tpu-vm', 'gke'])
def test_files_of_a_launch_are_private_and_gone_afterwards(open_umask, backend):
  job = dataclasses.replace(JOB, backend=backend, env={'GIVEN': SECRET})
  with bundle.launch_folder() as files:
    bundle.write_start_files(job, files)
    written = [path for path in Path(files).parent.rglob('*') if path.is_file()]
    assert {path.name for path in written} == (
      {'start.sh', 'files.env'} if backend == 'gke' else {'start.sh'}
    )
    assert {mode(path) for path in written} == {0o600}
    assert mode(Path(files).parent) == 0o700
    # The folder `files` becomes the image of the container, which others may pull.
    image = ''.join(path.read_text(encoding='utf-8') for path in Path(files).iterdir())
    assert leaks(image) == (backend != 'gke')
  assert not Path(files).parent.exists()


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_name_that_is_not_set_is_a_one_line_error(checkout, cloud, run, monkeypatch, backend):
  monkeypatch.delenv('TAKEN')
  cloud.play()
  code, out, err = run('launch', *BACKENDS[backend], *ENV, '--', 'job.py')
  assert (code, out) == (2, '')
  assert err == (
    'error: --env=TAKEN: TAKEN is not set here; `export TAKEN` first, or give TAKEN=VALUE\n'
  )


def test_a_refused_variable_is_named_without_its_value(checkout, cloud, run):
  for name in ('A-B', 'UID', 'LIBTPU_INIT_ARGS'):
    code, out, err = run('launch', *BACKENDS['gke'], f'--env={name}={SECRET}', '--', 'job.py')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert name in err
    assert not leaks(err)


def recorder(folder: Path, *names: str) -> dict[str, str]:
  """Create programs that record argv and environ. Return an environment whose PATH has them."""
  folder.mkdir()
  for name in names:
    (folder / name).write_text(
      f"""#!/bin/bash
printf '%s\\0' "$@" > {folder}/{name}.argv$((count=$(cat {folder}/{name}.count 2>/dev/null || echo 0)))
cat /proc/$$/environ > {folder}/{name}.environ$count
echo $((count + 1)) > {folder}/{name}.count
""",
      encoding='utf-8',
    )
    (folder / name).chmod(0o755)
  return {'PATH': f'{folder}:/usr/bin:/bin'}


def test_the_commands_of_a_local_dry_run_work_in_a_shell_with_the_variables_set(
  checkout, cloud, run, tmp_path
):
  words = ['job.py', "it's; touch PWNED", 'a\ntouch PWNED', '$(touch PWNED)']
  _, out, _ = run('launch', *BACKENDS['local'], *ENV, '--dry_run', '--', *words)
  assert len(out.splitlines()) == 2
  path = recorder(tmp_path / 'bin', 'python')
  environment = path | {'GIVEN': SECRET, 'TAKEN': SECRET}
  subprocess.run(['bash', '-u'], input=out.encode(), env=environment, cwd=tmp_path, check=True)
  for i in range(2):
    assert split_at_nul((tmp_path / f'bin/python.argv{i}').read_bytes()) == words
    got = parse_environ((tmp_path / f'bin/python.environ{i}').read_bytes())
    assert (got['GIVEN'], got['TAKEN'], got['VIT_JAX_PROCESS']) == (SECRET, SECRET, str(i))
  assert not list(tmp_path.rglob('PWNED*'))
  unset = subprocess.run(['bash'], input=out.encode(), env=path, capture_output=True, check=False)
  assert b'GIVEN: parameter not set' in unset.stderr or b'GIVEN: parameter null' in unset.stderr


def test_the_packing_command_of_a_dry_run_on_gke_writes_what_launch_writes(
  checkout, cloud, run, tmp_path
):
  _, out, _ = run('launch', *BACKENDS['gke'], *ENV, '--dry_run', '--', 'job.py')
  command = out.splitlines()[0]
  values = {'GIVEN': SECRET, 'TAKEN': "it's", 'VIT_JAX_RUN_TOKEN': '0' * 32}
  environment = os.environ | values
  subprocess.run(['bash', '-c', command], cwd=tmp_path, env=environment, check=True)
  assert mode(tmp_path / 'FILES.env') == 0o600
  name, _, packed = (tmp_path / 'FILES.env').read_text(encoding='utf-8').strip().partition('=')
  script = 'set -o allexport; eval "$0"; exec env -0'
  done = subprocess.run(
    ['bash', '-c', script, base64.b64decode(packed)], env={'PATH': '/usr/bin:/bin'},
    capture_output=True, check=True,
  )  # fmt: skip
  assert name == 'VIT_JAX_ENVIRONMENT'
  assert values.items() <= parse_environ(done.stdout).items()
  (tmp_path / 'FILES.env').unlink()
  environment.pop('GIVEN')
  done = subprocess.run(
    ['bash', '-c', command], cwd=tmp_path, env=environment, capture_output=True, check=False
  )
  assert done.returncode != 0
  assert not (tmp_path / 'FILES.env').exists()


@pytest.mark.parametrize('backend', CLOUDS)
def test_each_launch_has_a_new_token_which_all_its_hosts_share(
  checkout, cloud, run, tmp_path, backend
):
  """Hosts run the same start script, also those that `launch watch` creates again."""
  tokens = []
  for i in range(2):
    played(cloud)
    run('launch', *BACKENDS[backend], '--detach', '--', 'job.py')
    job = load_job('b16')
    received = [token_of_host(tmp_path / f'{i}-{host}', job) for host in range(2)]
    assert received == [job.env['VIT_JAX_RUN_TOKEN']] * 2
    tokens.append(received[0])
  assert tokens[0] != tokens[1]


def token_of_host(place: Path, job) -> str:
  """Run the start script, and return the token in the environment of its command."""
  if job.backend == 'gke':
    argv, variables = start_container(place, job)
  else:
    machine = Machine(place, job)
    assert machine.boot(0).wait(60) == 0
    argv, variables = machine.argv(), machine.variables()
  assert argv == ['job.py']
  return variables['VIT_JAX_RUN_TOKEN']


def test_a_token_given_by_the_user_is_used(checkout, cloud, run):
  played(cloud)
  run('launch', *BACKENDS['gke'], '--env=VIT_JAX_RUN_TOKEN=mine', '--detach', '--', 'job.py')
  assert load_job('b16').env['VIT_JAX_RUN_TOKEN'] == 'mine'


def test_a_temporary_folder_that_gcloud_would_split_is_refused(
  checkout, cloud, run, tmp_path, monkeypatch
):
  (tmp_path / 'a,b').mkdir()
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'a,b'))
  cloud.play()
  code, _, err = run('launch', *BACKENDS['tpu-vm'], '--', 'job.py')
  assert code == 2
  assert 'TMPDIR' in err
  assert not cloud.calls()
