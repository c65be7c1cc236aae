"""Is every host fit for a run? Each looks at itself, all tell each other, and one line a question says what came of it."""

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

PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'vit-jax')
HUGEPAGES = '/sys/kernel/mm/transparent_hugepage/enabled'
ROOM = 10  # GiB of disk: the environment, compiled programs, what gcsfuse keeps.
APART = 5  # Seconds that clocks may differ: credentials and logs go by them.


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
  """One line. `remedy` is there where `ok` is not."""

  what: str
  ok: bool
  text: str
  remedy: str = ''

  def __str__(self):
    return f'{"ok  " if self.ok else "FAIL"} {self.what:<10} {self.text}' + (
      f'  → {self.remedy}' if not self.ok else ''
    )


def examine(workdir: Path | None, data: Path | None, *, devices: int | None) -> list[Finding]:
  """All findings, the same on every host. `devices`: how many all hosts together should have."""
  mesh = make_mesh(1, batches={})
  token = broadcast(str(time.time_ns()))
  mine = {
    'versions': versions(),
    'disk': shutil.disk_usage(tempfile.gettempdir()).free / 2**30,
    'hugepages': hugepages(),
    'workdir': leave_word(workdir, token) if workdir else '',
    'data': look_at(data) if data else '',
  }
  multihost_utils.sync_global_devices('word is left')
  mine |= {'clock': time.time(), 'seen': find_words(workdir, token) if workdir else ''}
  hosts = gather(mine)
  if workdir:
    take_back(workdir, token)
  found = [check_versions(hosts), check_devices(mesh, devices), check_sum(mesh)]
  found += [check_workdir(workdir, hosts)] if workdir else []
  found += [check_data(data, hosts)] if data else []
  return [*found, check_disk(hosts), check_hugepages(hosts), check_clocks(hosts)]


def versions() -> dict[str, str]:
  """What this host runs."""
  installed = lambda name: next(
    (each.version for each in importlib.metadata.distributions(name=name)), 'none'
  )
  return {'python': platform.python_version()} | {name: installed(name) for name in PACKAGES}


def check_versions(hosts: list[dict]) -> Finding:
  """The same everywhere."""
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
  each = lambda name: ', '.join(
    f'{host["versions"][name]} on host {i}' for i, host in enumerate(hosts)
  )
  text = '; '.join(f'{name}: {each(name)}' for name in differ)
  return Finding('versions', False, text, 'install the same pins.txt everywhere; `launch` does')


def check_devices(mesh: Mesh, expected: int | None) -> Finding:
  """As many as there should be, shared out equally."""
  kind = describe_mesh(mesh).partition(' (')[0]
  each = np.bincount(
    [device.process_index for device in mesh.devices.flat], minlength=jax.process_count()
  )
  text = f'{kind} on {jax.process_count()} {"hosts" if jax.process_count() > 1 else "host"}'
  if len(set(each)) > 1:
    return Finding(
      'devices', False, f'{text}: {", ".join(map(str, each))}', 'restart the host with the fewest'
    )
  if expected and expected != mesh.size:
    remedy = 'start the same command on every host; a pod shows them all only when all take part'
    return Finding('devices', False, f'{text}, not {expected}', remedy)
  return Finding('devices', True, text)


def check_sum(mesh: Mesh) -> Finding:
  """An all-reduce over all devices: 0 + 1 + 2 + … is known."""
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


def leave_word(workdir: Path, token: str) -> str:
  """Writes a file for the others to read; what went wrong, if anything."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    word_of(workdir, token, jax.process_index()).write_text(token)
    return ''
  except OSError as error:
    return error.strerror or str(error)


def find_words(workdir: Path, token: str) -> str:
  """What is wrong with the others' files, if anything."""
  try:
    absent = [
      i for i in range(jax.process_count()) if not readable(word_of(workdir, token, i), token)
    ]
    return f'does not see what host {absent[0]} wrote' if absent else ''
  except OSError as error:
    return error.strerror or str(error)


def take_back(workdir: Path, token: str):
  """Removes its own file."""
  with contextlib.suppress(OSError):
    word_of(workdir, token, jax.process_index()).unlink()


def word_of(workdir: Path, token: str, host: int) -> Path:
  """The file of one host."""
  return workdir / f'.doctor-{token}-{host}'


def readable(path: Path, text: str) -> bool:
  """Whether a file says so."""
  return path.is_file() and path.read_text() == text


def check_workdir(workdir: Path, hosts: list[dict]) -> Finding:
  """Written by all and read by all: it is one and the same."""
  if bad := [
    f'host {i}: {host["workdir"] or host["seen"]}'
    for i, host in enumerate(hosts)
    if host['workdir'] or host['seen']
  ]:
    remedy = 'mount the same bucket there on every host, with roles/storage.objectAdmin for its service account'
    return Finding('workdir', False, f'{workdir}: {some(bad)}', remedy)
  return Finding('workdir', True, f'{workdir} is written and read by all')


def look_at(data: Path) -> str:
  """What is wrong with the data, if anything."""
  try:
    return '' if next(data.iterdir(), None) else 'is empty'
  except OSError as error:
    return error.strerror or str(error)


def check_data(data: Path, hosts: list[dict]) -> Finding:
  """There, on every host."""
  if bad := [f'host {i}: {host["data"]}' for i, host in enumerate(hosts) if host['data']]:
    return Finding(
      'data',
      False,
      f'{data}: {some(bad)}',
      'mount the bucket with it there; `launch --data=gs://…` does',
    )
  return Finding('data', True, f'{data} has something on every host')


def check_disk(hosts: list[dict]) -> Finding:
  """Room for temporary files."""
  least = min(range(len(hosts)), key=lambda i: hosts[i]['disk'])
  text = f'{hosts[least]["disk"]:.0f} GiB free in {tempfile.gettempdir()}, at the least'
  if hosts[least]['disk'] >= ROOM:
    return Finding('disk', True, text)
  return Finding(
    'disk', False, f'{text}, on host {least}', f'{ROOM} GiB should be: remove what fills it'
  )


def hugepages() -> str:
  """What the kernel does: always, madvise, never; '' where it does not say, or no TPU asks for it."""
  try:
    return Path(HUGEPAGES).read_text().partition('[')[2].partition(']')[0]
  except OSError:
    return ''


def check_hugepages(hosts: list[dict]) -> Finding:
  """Always, where there are TPUs: copies from the host are slow otherwise. Elsewhere they are nobody's concern."""
  found = sorted({host['hugepages'] or 'unknown' for host in hosts})
  if found == ['always'] or jax.default_backend() != 'tpu':
    return Finding(
      'hugepages',
      True,
      ', '.join(found) + ('' if jax.default_backend() == 'tpu' else ' (TPUs want always)'),
    )
  return Finding(
    'hugepages', False, ', '.join(found), f"sudo sh -c 'echo always > {HUGEPAGES}'; `launch` does"
  )


def check_clocks(hosts: list[dict]) -> Finding:
  """Read at the same moment, as far as a barrier makes it one."""
  clocks = [host['clock'] for host in hosts]
  text = f'{max(clocks) - min(clocks):.2f} s apart'
  if max(clocks) - min(clocks) <= APART:
    return Finding('clocks', True, text)
  return Finding(
    'clocks',
    False,
    f'{text}: host {int(np.argmin(clocks))} is behind',
    'sudo systemctl restart chrony',
  )


def some(bad: list[str]) -> str:
  """The first few."""
  return '; '.join(bad[:4]) + (f'; and {len(bad) - 4} more' if len(bad) > 4 else '')


def broadcast(text: str) -> str:
  """Host 0's text, to all."""
  return gather(text)[0]


def gather(value) -> list:
  """What each host says, in their order, on every host."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(data)))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]
