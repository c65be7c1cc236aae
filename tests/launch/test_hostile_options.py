"""Any word in any option of `launch` gives a valid result or a one-line error."""

import os
import re
import subprocess

import pytest

from tests.launch.hostile_words import HOSTILE
from vit_jax.launch.shell import format_command

WHERE = {'zone': 'us-west4-a', 'workdir': 'gs://runs/b16', 'name': 'b16'}
BACKENDS = {
  'local': {'backend': 'local', 'hosts': '1'},
  'tpu-vm': {'backend': 'tpu-vm', 'tpu': 'v6e-8', 'project': 'paper', **WHERE},
  'queued': {'backend': 'queued', 'tpu': 'v5litepod-16', 'slices': '2', **WHERE},
  'gke': {'backend': 'gke', 'tpu': 'v5litepod-16', 'cluster': 'tpus', 'data': 'gs://sets', **WHERE},
}
CLOUD_OPTIONS = (
  'backend', 'tpu', 'slices', 'project', 'zone', 'name', 'workdir', 'data', 'env', 'libtpu_args', 'poll',
)  # fmt: skip
OPTIONS = {
  'local': ('backend', 'workdir', 'env', 'hosts', 'devices_per_host'),
  'tpu-vm': CLOUD_OPTIONS,
  'queued': ('slices', 'name'),  # Otherwise it shares the code of tpu-vm.
  'gke': (*CLOUD_OPTIONS, 'cluster'),
}
TOOLS = ('git', 'gcloud', 'xpk', 'kubectl', 'tar', 'rm', 'python')


@pytest.fixture
def copied(tmp_path):
  """Run the commands that a dry run prints, with programs that do nothing; return the errors."""
  (tmp_path / 'tools').mkdir()
  for name in TOOLS:
    (tmp_path / 'tools' / name).write_text('#!/bin/bash\n', encoding='utf-8')
    (tmp_path / 'tools' / name).chmod(0o755)
  env = {'PATH': f'{tmp_path}/tools:/usr/bin:/bin', 'VIT_JAX_RUN_TOKEN': 'x', 'A': 'x', 'a': 'x'}

  def copied(out: str) -> str:
    commands, _, rest = out.partition('# FILES/start.sh\n')
    script, _, after = rest.partition('# launch status')
    checked = subprocess.run(['bash', '-n'], input=script.encode(), capture_output=True, check=True)
    done = subprocess.run(
      ['bash', '-eu'], input=f'{commands}\n#{after}'.encode(), env=env, cwd=tmp_path,
      capture_output=True, check=False,
    )  # fmt: skip
    return (checked.stderr + done.stderr).decode()

  return copied


def check(result, copied, what: str):
  """Check the result of one `launch --dry_run`: commands that can be copied, or one line."""
  code, out, err = result
  if code == 0:
    assert copied(out) == '', what
    assert 'Traceback' not in err, what
    return
  last = err.removesuffix('\n').rpartition('\n')[2]
  assert (code, out) == (2, ''), what
  assert last.startswith('error: '), (what, err)
  assert not re.search('[^\n -~\x80-\U0010ffff]|Traceback', err), (what, err)


@pytest.mark.parametrize('backend', BACKENDS)
def test_hostile_words_in_every_option(checkout, cloud, run, copied, tmp_path, backend):
  """Each word is given alone, and appended to a valid value."""
  cloud.play()
  right = BACKENDS[backend]
  for option in OPTIONS[backend]:
    for word in HOSTILE:
      for text in (word, f'{right.get(option, "A=")}{word}'):
        flags = [f'--{name}={value}' for name, value in (right | {option: text}).items()]
        result = run('launch', *flags, '--dry_run', '--', 'job.py')
        check(result, copied, f'{backend}: --{option}={text!r}')
  assert not list(tmp_path.rglob('PWNED*'))


@pytest.mark.parametrize('option', OPTIONS['gke'])
def test_a_newline_with_a_command_in_every_option(checkout, cloud, run, copied, tmp_path, option):
  cloud.play()
  for right in (BACKENDS['tpu-vm'], BACKENDS['gke']):
    flags = right | {option: f'{right.get(option, "A=")}\ntouch PWNED\n$(touch PWNED)'}
    flags = [f'--{name}={value}' for name, value in flags.items()]
    check(run('launch', *flags, '--dry_run', '--', 'job.py'), copied, option)
  assert not list(tmp_path.rglob('PWNED*'))


@pytest.mark.parametrize('backend', ['local', 'tpu-vm', 'gke'])
def test_hostile_words_in_every_place_of_the_command(
  checkout, cloud, run, copied, tmp_path, backend
):
  cloud.play()
  flags = [f'--{name}={value}' for name, value in BACKENDS[backend].items() if name != 'name']
  for word in HOSTILE:
    for command in ([word], ['job.py', word], ['-m', word]):
      result = run('launch', *flags, '--dry_run', '--', *command)
      check(result, copied, f'{backend}: -- {command!r}')
  assert not list(tmp_path.rglob('PWNED*'))


@pytest.mark.parametrize('backend', ['local', 'tpu-vm'])
def test_hostile_words_in_the_settings_of_a_run(checkout, cloud, run, copied, tmp_path, backend):
  cloud.play()
  flags = [f'--{name}={value}' for name, value in BACKENDS[backend].items()]
  recipe = '--config=configs/quickstart.py'
  for word in HOSTILE:
    for settings in (
      [recipe, f'--config.data.train={word}'], [recipe, f'--config.{word}=1'], [recipe, word],
      [f'--config={word}'], [f'{recipe}:{word}'], [f'--workdir={word}'],
    ):  # fmt: skip
      result = run('launch', *flags, '--no_plan', '--dry_run', '--', 'run_pretrain.py', *settings)
      check(result, copied, f'{backend}: {settings!r}')
  assert not list(tmp_path.rglob('PWNED*'))


def test_a_printed_command_is_read_back_by_bash(tmp_path):
  commands = [['show', word, f'--flag={word}', f'x{word}', '--y=' + 'y' * 120] for word in HOSTILE]
  script = 'show() { printf "%s\\0" show "$@"; }\n' + '\n'.join(map(format_command, commands))
  done = subprocess.run(
    ['bash'], input=script.encode(), cwd=tmp_path, capture_output=True, check=True
  )
  assert done.stdout == b''.join(os.fsencode(word) + b'\0' for each in commands for word in each)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('place', ['command', 'value'])
def test_a_nul_character_is_refused(checkout, cloud, run, place):
  cloud.play()
  env = '--env=A=x\0y' if place == 'value' else '--env=A=x'
  word = 'x\0y' if place == 'command' else 'x'
  code, out, err = run('launch', '--hosts=1', env, '--', 'job.py', word)
  assert (code, out, err.count('\n')) == (2, '', 1)
  assert 'NUL' in err
