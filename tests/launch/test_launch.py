"""`python -m vit_jax launch`: errors, dry runs, and the commands that it runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.errors import UserError
from vit_jax.tpu.accelerators import ACCELERATOR_KINDS, accelerator_names, parse_accelerator

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / 'golden'
SETTINGS = (
  '--config=configs/pretrain.py:B/16,imagenet21k',
  '--config.data.train=folder:/mnt/data/imagenet21k',
)
TRAIN = ('--', 'run_pretrain.py', *SETTINGS)
WHERE = (
  '--project=paper',
  '--zone=us-west4-a',
  '--workdir=gs://paper-runs/b16',
  '--data=gs://paper-data/sets',
  '--name=b16',
)
POD = ('launch', '--backend=queued', '--tpu=v5litepod-256', '--spot', *WHERE, '--no_plan')


DRY = {
  'queued_spot_v5e': POD,
  'queued_two_slices': ('launch', '--backend=queued', '--tpu=v5e:16x16', '--slices=2', *WHERE, '--no_plan'),
  'gke_two_slices': (*POD, '--backend=gke', '--cluster=tpus', '--slices=2'),
  'tpu_vm_v6e': ('launch', '--backend=tpu-vm', '--tpu=v6e-8', *WHERE, '--no_plan'),
}  # fmt: skip


@pytest.mark.parametrize('name', DRY)
def test_a_dry_run_prints_every_command_and_runs_none(checkout, cloud, run, name):
  """GOLDEN=write updates the expected texts."""
  cloud.play()
  code, out, _ = run(*DRY[name], '--dry_run', *TRAIN)
  commit = subprocess.run(
    ['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True
  ).stdout[:12]
  python = f'{sys.version_info.major}.{sys.version_info.minor}'
  text = (
    out.replace(str(checkout), 'CHECKOUT')
    .replace(commit, 'COMMIT')
    .replace(f'python {python}', 'python 3.1x')
  )
  text = text.replace(f'python:{python}', 'python:3.1x')
  if os.environ.get('GOLDEN') == 'write':
    (GOLDEN / f'{name}.txt').write_text(text, encoding='utf-8')
  assert code == 0
  assert text == (GOLDEN / f'{name}.txt').read_text(encoding='utf-8')
  assert not cloud.calls()


@pytest.mark.parametrize('where', [POD, ('launch', '--backend=local')])
def test_a_dry_run_does_not_show_passwords_in_urls(checkout, cloud, run, where):
  cloud.play()
  _, out, _ = run(
    *where, '--dry_run', *TRAIN, '--config.init=https://ann:s3cret@example.com/vit.npz'
  )
  assert 'https://***@example.com/vit.npz' in out and 's3cret' not in out


@pytest.mark.parametrize('name', DRY)
def test_the_start_up_script_has_valid_bash_syntax(name):
  script = (
    (GOLDEN / f'{name}.txt')
    .read_text(encoding='utf-8')
    .partition('# FILES/start.sh\n')[2]
    .partition('\n# launch status')[0]
  )
  assert script.startswith('#!/usr/bin/env bash\n')
  assert (
    subprocess.run(['bash', '-n'], input=script, text=True, capture_output=True, check=False).stderr
    == ''
  )


def test_a_launch_uploads_the_commit_and_the_versions_and_deletes_the_machines_of_a_finished_run(
  checkout, cloud, run
):
  cloud.play(
    describe=[[0, json.dumps({'state': {'state': 'ACTIVE'}}), '']], exits=[[0, '0\n' * 64, '']]
  )
  code, _, err = run(*POD, '--poll=0.01', *TRAIN)
  assert code == 0, err
  assert [call[3:5] for call in cloud.calls('compute') if call[4] in ('create', 'delete')] == [
    ['queued-resources', 'create'], ['queued-resources', 'delete'],
  ]  # fmt: skip
  assert [re.sub('.*/', '', word) for word in cloud.calls('cp')[0][3:5]] == [
    'code.tar.gz',
    'pins.txt',
  ]
  assert 'LIBTPU_INIT_ARGS=--xla_tpu_enable_latency_hiding_scheduler=true' in err
  assert 'NOT PLANNED' in err


WRONG = {
  'no command': (POD, 'expected -- and the command'),
  'an unknown verb': (('launch', 'stauts', 'b16'), "got 'stauts'. Did you mean 'status'?"),
  'an unknown slice': ((*POD, '--tpu=v5litepod-255', *TRAIN), '--tpu=v5litepod-255'),
  'an unknown kind': ((*POD, '--tpu=v5lite-256', *TRAIN), "Did you mean 'v5litepod-256'?"),
  'a batch that does not '
  'divide': ((*POD, *TRAIN, '--config.data.batch=4000'), '256 devices of 64 hosts'),
  'fsdp that does not '
  'divide': ((*POD, *TRAIN, '--config.mesh.fsdp=3'), 'config.mesh.fsdp=3 does not divide the 256 '
                                                     'devices'),
  'an unknown setting': ((*POD, *TRAIN, '--config.optm.lr=3'), "Did you mean 'config.optim.lr'?"),
  'a bad name': ((*POD, '--name=B_16', *TRAIN), '--name=B_16: expected at most 40'),
  'a local workdir': ((*POD, '--workdir=runs/x', *TRAIN), '--workdir=runs/x: expected '
                                                          'gs://BUCKET/PATH'),
  'a bucket without a path': ((*POD, '--workdir=gs://runs', *TRAIN), '--workdir=gs://runs'),
  'two workdirs': ((*POD, *TRAIN, '--workdir=x'), 'goes before the --'),
  'no zone': (('launch', '--backend=queued', '--tpu=v4-8', *TRAIN), 'needs --workdir and --zone'),
  'no cluster': ((*POD, '--backend=gke', *TRAIN), '--backend=gke needs --cluster'),
  'slices of a TPU '
  'VM': ((*POD, '--backend=tpu-vm', '--slices=2', *TRAIN), '--backend=queued for several'),
  'Ironwood outside GKE': ((*POD, '--tpu=tpu7x-8', *TRAIN), '--backend=gke'),
  'an invalid variable name': ((*POD, '--env=A-B=1', *TRAIN), '--env=A-B=…: expected NAME=VALUE'),
  'no tool': ((*POD, '--backend=gke', '--cluster=tpus', *TRAIN), 'xpk is not installed'),
}  # fmt: skip


@pytest.mark.parametrize('case', WRONG)
def test_a_wrong_option_is_a_one_line_error_before_anything_is_created(checkout, cloud, run, case):
  args, message = WRONG[case]
  if case == 'no tool':
    (cloud.place / 'bin' / 'xpk').unlink()
  cloud.play()
  code, _, err = run(*args)
  assert (code, [line for line in err.splitlines() if line.startswith('error: ')]) == (
    2,
    err.splitlines()[-1:],
  )
  assert message in err
  assert not cloud.calls('create')


def test_uncommitted_changes_are_an_error_without_allow_dirty(checkout, cloud, run):
  (checkout / 'configs' / 'mine.py').write_text('', encoding='utf-8')
  code, _, err = run(*POD, '--dry_run', *TRAIN)
  assert (code, '--allow_dirty' in err) == (
    2,
    True,
  )
  code, _, err = run(*POD, '--dry_run', '--allow_dirty', *TRAIN)
  assert (code, 'not launched, since it is not in commit' in err) == (0, True)


def test_without_libtpu_a_launch_prints_how_to_install_it(checkout, cloud, run, monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  code, _, err = run(*[arg for arg in POD if arg != '--no_plan'], *TRAIN)
  assert (code, "needs libtpu: pip install 'vit-jax[plan]'" in err, '--no_plan' in err) == (
    2,
    True,
    True,
  )


def planned(monkeypatch, fits: bool) -> list:
  """Replace `plan` by one that returns this result at once. Return the list of its commands."""
  called = []

  def plan(command, **_):
    called.append(command)
    path = next(word for word in command if word.startswith('--json=')).removeprefix('--json=')
    Path(path).write_text(
      json.dumps({'fits': fits, 'hbm': 20 * 2**30, 'seconds_per_step': 0.1, 'steps': 36_000}),
      encoding='utf-8',
    )
    return subprocess.CompletedProcess(command, 0 if fits else 1)

  monkeypatch.setattr('importlib.util.find_spec', lambda name: True)
  monkeypatch.setattr('vit_jax.launch.memory_check.subprocess.run', plan)
  return called


def test_a_run_is_planned_once_and_the_result_is_cached(checkout, cloud, run, monkeypatch):
  from vit_jax.cli.jobs import parse_config_flags
  from vit_jax.launch.memory_check import check_fits

  called, settings = planned(monkeypatch, fits=True), list(SETTINGS)
  for _ in range(2):
    check_fits(
      parse_config_flags(settings),
      settings,
      parse_accelerator('v5litepod-256'),
      libtpu_args='--x=1',
    )
  assert len(called) == 1
  assert {'--topology=v5e:16x16', '--slices=1', '--config.data.train=folder:imagenet21k'} <= set(
    called[0]
  )
  check_fits(
    parse_config_flags([*settings, '--config.seed=1']),
    settings,
    parse_accelerator('v5litepod-256'),
    libtpu_args='--x=1',
  )
  assert len(called) == 2


def test_a_run_that_does_not_fit_is_not_launched(checkout, cloud, monkeypatch):
  from vit_jax.cli.jobs import parse_config_flags
  from vit_jax.launch.memory_check import check_fits

  planned(monkeypatch, fits=False)
  with pytest.raises(
    UserError,
    match=r'20.0 GiB .*v5e:16x16.*config.model.remat',
  ):
    check_fits(
      parse_config_flags(list(SETTINGS)),
      list(SETTINGS),
      parse_accelerator('v5litepod-256'),
      libtpu_args='',
    )


def test_each_slice_has_one_name_in_the_cloud_and_one_in_the_compiler():
  table = {
    'v4-8': 'v4:2x2x1',
    'v5litepod-256': 'v5e:16x16',
    'v5p-128': 'v5p:4x4x4',
    'v6e-256': 'v6e:16x16',
    'tpu7x-8': 'tpu7x:2x2x1',
  }
  assert table.items() <= accelerator_names().items()
  assert all(
    parse_accelerator(topology).name == name for name, topology in accelerator_names().items()
  )
  assert {
    name.partition(':')[0] for name in accelerator_names().values()
  } == ACCELERATOR_KINDS.keys()


def test_the_number_of_hosts_of_a_slice_is_that_of_the_cloud():
  hosts = {'v5litepod-8': 1, 'v5litepod-16': 4, 'v6e-8': 1, 'v4-8': 1, 'v4-16': 2, 'v5p-128': 16}
  assert {name: parse_accelerator(name).hosts for name in hosts} == hosts
