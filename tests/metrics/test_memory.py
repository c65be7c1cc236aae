"""The recorded memory is that of the kernel and of the devices."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vit_jax.metrics.memory import measure_memory, resident_bytes
from vit_jax.sharding.mesh import device_memory


def kernel_resident_bytes() -> int:
  """Return the resident memory of this process by another file of the kernel."""
  return 1024 * int(
    re.search(r'VmRSS:\s+(\d+) kB', Path('/proc/self/status').read_text('utf-8'))[1]
  )


def test_the_resident_memory_is_that_of_the_kernel():
  assert resident_bytes() == pytest.approx(kernel_resident_bytes(), rel=0.05)


def test_the_private_memory_of_child_processes_counts():
  before = resident_bytes()
  code = "block = bytearray(b'x') * 200_000_000; print('ready', flush=True); input()"
  with subprocess.Popen(
    [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as child:
    child.stdout.readline()
    grown = resident_bytes() - before
    child.stdin.close()
  assert 200_000_000 < grown < 230_000_000


def test_a_system_without_proc_records_no_host_memory(tmp_path):
  assert resident_bytes(tmp_path) is None


def device(**stats):
  return SimpleNamespace(memory_stats=lambda: stats or None)


def test_the_device_that_uses_the_most_is_recorded():
  devices = [
    device(bytes_in_use=5, peak_bytes_in_use=9, bytes_limit=16),
    device(bytes_in_use=7, peak_bytes_in_use=8, bytes_limit=16),
  ]
  mesh = SimpleNamespace(local_devices=devices)
  assert device_memory(mesh) == {'device_bytes_in_use': 7, 'device_peak_bytes_in_use': 9}
  assert measure_memory(mesh).keys() == {
    'device_bytes_in_use', 'device_peak_bytes_in_use', 'host_resident_bytes',
  }  # fmt: skip


def test_devices_that_do_not_count_record_nothing():
  assert device_memory(SimpleNamespace(local_devices=[device(), device()])) == {}
