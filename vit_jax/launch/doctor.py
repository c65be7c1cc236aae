"""Checks whether every host is fit for a run.

All hosts share what they find, and each check becomes one line.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import shutil
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.sharding.mesh import Mesh, describe_mesh, make_mesh, replicated, to_global

DOCTOR_PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'vit-jax')
HUGEPAGES_FILE = '/sys/kernel/mm/transparent_hugepage/enabled'
MIN_FREE_DISK_GIB = 10  # For the environment, compiled programs and gcsfuse's cache.
MAX_CLOCK_SKEW = 5  # Seconds. Credentials and logs depend on clocks.


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
  """One line of the report. `remedy` is given if `ok` is False."""

  what: str
  ok: bool
  text: str
  remedy: str = ''

  def __str__(self):
    return f'{"ok  " if self.ok else "FAIL"} {self.what:<10} {self.text}' + (
      f'  → {self.remedy}' if not self.ok else ''
    )


def diagnose_hosts(
  workdir: Path | None, data: Path | None, *, devices: int | None
) -> list[Finding]:
  """Run all checks and return the findings, the same on every host.

  `devices` is the expected number of devices of all hosts together.
  """
  mesh = make_mesh(1, batches={})
  token = broadcast_from_first_host(str(time.time_ns()))
  own = {
    'versions': installed_versions(),
    'disk': shutil.disk_usage(tempfile.gettempdir()).free / 2**30,
    'hugepages': read_hugepages(),
    'workdir': write_probe_file(workdir, token) if workdir else '',
    'data': read_data_folder(data) if data else '',
  }
  multihost_utils.sync_global_devices('probe files are written')
  own |= {'clock': time.time(), 'seen': read_probe_files(workdir, token) if workdir else ''}
  hosts = all_gather_json(own)
  if workdir:
    remove_probe_file(workdir, token)
  found = [diagnose_versions(hosts), diagnose_devices(mesh, devices), diagnose_all_reduce(mesh)]
  found += [diagnose_workdir(workdir, hosts)] if workdir else []
  found += [diagnose_data(data, hosts)] if data else []
  return [*found, diagnose_disk(hosts), diagnose_hugepages(hosts), diagnose_clocks(hosts)]


def installed_versions() -> dict[str, str]:
  """Return the versions of Python and of the packages on this host."""
  installed = lambda name: next(
    (each.version for each in importlib.metadata.distributions(name=name)), 'none'
  )
  return {'python': platform.python_version()} | {name: installed(name) for name in DOCTOR_PACKAGES}


def diagnose_versions(hosts: list[dict]) -> Finding:
  """Compare the versions of all hosts."""
  differ = [
    name for name in hosts[0]['versions'] if len({host['versions'][name] for host in hosts}) > 1
  ]
  if not differ:
    first = hosts[0]['versions']
    return Finding(
      'versions',
      True,
      ', '.join(f'{name} {first[name]}' for name in first if first[name] != 'none'),
    )
  per_host = lambda name: ', '.join(
    f'{host["versions"][name]} on host {i}' for i, host in enumerate(hosts)
  )
  text = '; '.join(f'{name}: {per_host(name)}' for name in differ)
  return Finding('versions', False, text, 'install the same pins.txt everywhere; `launch` does')


def diagnose_devices(mesh: Mesh, expected: int | None) -> Finding:
  """Check that the devices are as many as expected, and equally many on each host."""
  kind = describe_mesh(mesh).partition(' (')[0]
  each = np.bincount(
    [device.process_index for device in mesh.devices.flat], minlength=jax.process_count()
  )
  text = f'{kind} on {jax.process_count()} {"hosts" if jax.process_count() > 1 else "host"}'
  if len(set(each)) > 1:
    return Finding(
      'devices',
      False,
      f'{text}: {", ".join(map(str, each))}',
      'restart the host with the fewest devices',
    )
  if expected and expected != mesh.size:
    remedy = (
      'start the same command on every host; a pod shows its devices only when all hosts take part'
    )
    return Finding('devices', False, f'{text}, not {expected}', remedy)
  return Finding('devices', True, text)


def diagnose_all_reduce(mesh: Mesh) -> Finding:
  """Sum the numbers of all devices over all devices: the result is known."""
  own = [
    i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()
  ]
  numbers = to_global({'x': np.array(own, np.int32)}, mesh)['x']
  total = int(jax.jit(lambda x: x.sum(), out_shardings=replicated(mesh))(numbers))
  text = f'the sum over {mesh.size} devices is {total}'
  if total == math.comb(mesh.size, 2):
    return Finding('all-reduce', True, text)
  return Finding(
    'all-reduce',
    False,
    f'{text}, not {math.comb(mesh.size, 2)}',
    'a broken link or chip: take another slice',
  )


def write_probe_file(workdir: Path, token: str) -> str:
  """Write a file for the other hosts to read. Return what went wrong, or an empty string."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe_path(workdir, token, jax.process_index()).write_text(token, encoding='utf-8')
    return ''
  except OSError as error:
    return error.strerror or str(error)


def read_probe_files(workdir: Path, token: str) -> str:
  """Read the other hosts' files. Return what went wrong, or an empty string."""
  try:
    absent = [
      i
      for i in range(jax.process_count())
      if not file_contains(probe_path(workdir, token, i), token)
    ]
    return f'does not see what host {absent[0]} wrote' if absent else ''
  except OSError as error:
    return error.strerror or str(error)


def remove_probe_file(workdir: Path, token: str):
  """Remove this host's file."""
  with contextlib.suppress(OSError):
    probe_path(workdir, token, jax.process_index()).unlink()


def probe_path(workdir: Path, token: str, host: int) -> Path:
  """Return the path of the file that a host writes."""
  return workdir / f'.doctor-{token}-{host}'


def file_contains(path: Path, text: str) -> bool:
  """Return whether a file exists and has exactly this text."""
  return path.is_file() and path.read_text(encoding='utf-8') == text


def diagnose_workdir(workdir: Path, hosts: list[dict]) -> Finding:
  """Check that all hosts write and read the same work directory."""
  if bad := [
    f'host {i}: {host["workdir"] or host["seen"]}'
    for i, host in enumerate(hosts)
    if host['workdir'] or host['seen']
  ]:
    remedy = (
      'mount the same bucket there on every host, with roles/storage.objectAdmin for its '
      'service account'
    )
    return Finding('workdir', False, f'{workdir}: {join_first(bad)}', remedy)
  return Finding('workdir', True, f'{workdir} is writable and readable on all hosts')


def read_data_folder(data: Path) -> str:
  """Return what is wrong with the data folder, or an empty string."""
  try:
    return '' if next(data.iterdir(), None) else 'is empty'
  except OSError as error:
    return error.strerror or str(error)


def diagnose_data(data: Path, hosts: list[dict]) -> Finding:
  """Check that the data is on every host."""
  if bad := [f'host {i}: {host["data"]}' for i, host in enumerate(hosts) if host['data']]:
    return Finding(
      'data',
      False,
      f'{data}: {join_first(bad)}',
      'mount the bucket with it there; `launch --data=gs://…` does',
    )
  return Finding('data', True, f'{data} is not empty on any host')


def diagnose_disk(hosts: list[dict]) -> Finding:
  """Check that there is space for temporary files."""
  least = min(range(len(hosts)), key=lambda i: hosts[i]['disk'])
  text = f'{hosts[least]["disk"]:.0f} GiB free in {tempfile.gettempdir()} (minimum over hosts)'
  if hosts[least]['disk'] >= MIN_FREE_DISK_GIB:
    return Finding('disk', True, text)
  return Finding(
    'disk',
    False,
    f'{text}, on host {least}',
    f'{MIN_FREE_DISK_GIB} GiB are needed: free some space',
  )


def read_hugepages() -> str:
  """Return the setting of transparent huge pages: always, madvise or never.

  Empty if the kernel does not report it.
  """
  try:
    return Path(HUGEPAGES_FILE).read_text(encoding='utf-8').partition('[')[2].partition(']')[0]
  except OSError:
    return ''


def diagnose_hugepages(hosts: list[dict]) -> Finding:
  """Check that huge pages are `always` on TPU hosts, where copies are slow otherwise."""
  found = sorted({host['hugepages'] or 'unknown' for host in hosts})
  if found == ['always'] or jax.default_backend() != 'tpu':
    return Finding(
      'hugepages',
      True,
      ', '.join(found) + ('' if jax.default_backend() == 'tpu' else ' (TPUs want always)'),
    )
  return Finding(
    'hugepages',
    False,
    ', '.join(found),
    f"sudo sh -c 'echo always > {HUGEPAGES_FILE}'; `launch` does",
  )


def diagnose_clocks(hosts: list[dict]) -> Finding:
  """Compare the clocks, which are read right after a barrier."""
  clocks = [host['clock'] for host in hosts]
  text = f'{max(clocks) - min(clocks):.2f} s apart'
  if max(clocks) - min(clocks) <= MAX_CLOCK_SKEW:
    return Finding('clocks', True, text)
  return Finding(
    'clocks',
    False,
    f'{text}: host {int(np.argmin(clocks))} is behind',
    'sudo systemctl restart chrony',
  )


def join_first(bad: list[str]) -> str:
  """Join the first four texts and count the others."""
  return '; '.join(bad[:4]) + (f'; and {len(bad) - 4} more' if len(bad) > 4 else '')


def broadcast_from_first_host(text: str) -> str:
  """Return host 0's text on every host."""
  return all_gather_json(text)[0]


def all_gather_json(value) -> list:
  """Gather a JSON value from every host, in their order, on every host."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(data)))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]
