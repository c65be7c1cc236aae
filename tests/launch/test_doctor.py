"""The doctor reports faults of hosts. For hosts without faults see test_several_hosts.py."""

import re

import jax
import pytest

from vit_jax.launch import doctor
from vit_jax.sharding.mesh import make_mesh


def host(**changes) -> dict:
  """Return the report of a host without faults, with some entries replaced."""
  own = {
    'versions': {'jax': '0.10.2', 'libtpu': '0.0.52'},
    'disk': 50.0,
    'hugepages': 'always',
    'clock': 1000.0,
  }
  return own | {'workdir': '', 'seen': '', 'data': ''} | changes


def test_one_host_is_examined_alone(tmp_path):
  (tmp_path / 'x').touch()
  found = doctor.diagnose_hosts(tmp_path / 'run', tmp_path, devices=8)
  assert [finding.what for finding in found if not finding.ok and finding.what != 'disk'] == []
  assert str(found[1]) == 'ok   devices    8 x cpu on 1 host'
  assert str(found[2]) == 'ok   all-reduce the sum over 8 devices is 28'


FAULTY = {
  'versions': (
    lambda: doctor.diagnose_versions([host(), host(versions={'jax': '0.10.2', 'libtpu': '0.0.40'})]),
    'FAIL versions   libtpu: 0.0.52 on host 0, 0.0.40 on host 1  → install the same pins.txt '
    'everywhere; `launch` does',
  ),
  'devices': (
    lambda: doctor.diagnose_devices(make_mesh(1, batches={}), 16),
    'FAIL devices    8 x cpu on 1 host, not 16  → start the same command on every host; .*',
  ),
  'disk': (
    lambda: doctor.diagnose_disk([host(), host(disk=2.0)]),
    r'FAIL disk       2 GiB free in .*on host 1  → 10 GiB .*',
  ),
  'clocks': (
    lambda: doctor.diagnose_clocks([host(clock=1007.5), host()]),
    'FAIL clocks     7.50 s apart: host 1 is behind  → sudo systemctl restart chrony',
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', FAULTY)
def test_a_fault_is_one_line_with_its_remedy(case):
  check, line = FAULTY[case]
  assert re.fullmatch(line, str(check()))


def test_a_workdir_that_is_not_shared_is_a_fault(tmp_path):
  line = str(
    doctor.diagnose_workdir(tmp_path, [host(), host(seen='does not see what host 0 wrote')])
  )
  assert (
    f'{tmp_path}: host 1: does not see what host 0 wrote  → mount the same bucket there' in line
  )


def test_a_workdir_that_cannot_be_written_is_a_fault(tmp_path):
  (tmp_path / 'file').touch()
  assert doctor.write_probe_file(tmp_path / 'file' / 'run', 'token') == 'Not a directory'
  assert doctor.read_data_folder(tmp_path / 'none') == 'No such file or directory'


def test_hugepages_are_required_only_on_tpus(monkeypatch):
  assert doctor.diagnose_hugepages([host(hugepages='madvise')]).ok
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert not doctor.diagnose_hugepages([host(hugepages='madvise'), host()]).ok
  assert doctor.diagnose_hugepages([host()]).ok
