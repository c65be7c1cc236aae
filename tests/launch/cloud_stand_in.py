#!/usr/bin/env python3
"""A stand-in for gcloud, xpk and kubectl.

It accepts the flags that they accept, and replays the answers that a test has written.

The folder $STAND_IN has play.json: {the first words of a command: [[exit code, stdout, stderr], …]}.
Calls of a command get these answers in sequence; the last one repeats. Every call is appended to
calls.jsonl there.

Sources of the flags: `gcloud … --help` of Google Cloud SDK 528, the parsers of xpk 1.16.0, `kubectl … --help` of
1.32.
"""

import fcntl
import json
import os
import re
import sys
from pathlib import Path

WIDE = {'project', 'quiet', 'format', 'verbosity'}
CREATE = {
  'zone',
  'spot',
  'metadata-from-file',
  'accelerator-type',
  'async',
  'labels',
  'network',
  'subnetwork',
  'reserved',
}
ALWAYS_XPK = {'cluster', 'project', 'zone'}
# First words of a command -> (required flags, optional flags, number of words that follow).
TAKES = {
  'gcloud compute tpus queued-resources create': (
    {'zone', 'runtime-version', 'accelerator-type'}, CREATE | {'node-id', 'node-count', 'node-prefix'}, 1),
  'gcloud compute tpus queued-resources describe': ({'zone'}, set(), 1),
  'gcloud compute tpus queued-resources delete': ({'zone'}, {'force', 'async'}, 1),
  'gcloud compute tpus tpu-vm create': ({'zone', 'version'}, CREATE, 1),
  'gcloud compute tpus tpu-vm describe': ({'zone'}, set(), 1),
  'gcloud compute tpus tpu-vm delete': ({'zone'}, {'async'}, 1),
  'gcloud compute tpus tpu-vm ssh': ({'zone'}, {'worker', 'command', 'internal-ip', 'ssh-flag'}, 1),
  'gcloud storage cp': (set(), {'recursive', 'no-clobber'}, None),
  'gcloud storage cat': (set(), {'range'}, None),
  'gcloud storage rm': (set(), {'recursive'}, None),
  'xpk workload create': (
    {'workload', 'cluster', 'command', 'tpu-type'},
    ALWAYS_XPK | {'num-slices', 'spot', 'base-docker-image', 'script-dir', 'storage', 'max-restarts', 'restart-on-exit-codes',
                  'docker-image', 'priority', 'env', 'env-file', 'on-demand', 'reservation', 'termination-grace-period-seconds'}, 0),
  'xpk workload delete': ({'cluster'}, ALWAYS_XPK | {'workload', 'force'}, 0),
  'xpk storage attach': (
    {'cluster', 'type', 'auto-mount', 'mount-point', 'readonly'}, ALWAYS_XPK | {'bucket', 'size', 'mount-options'}, 1),
  'xpk storage detach': ({'cluster'}, ALWAYS_XPK, 1),
  'kubectl get jobset': (set(), {'output'}, 1),
  'kubectl logs': (set(), {'selector', 'follow', 'prefix', 'tail', 'since', 'max-log-requests', 'ignore-errors'}, 0),
}  # fmt: skip
SWITCHES = {'spot', 'force', 'quiet', 'async', 'follow', 'prefix', 'ignore-errors', 'reserved'}
VALUES = {
  'accelerator-type': r'v4-\d+|v5litepod-\d+|v5p-\d+|v6e-\d+', 'tpu-type': r'v4-\d+|v5litepod-\d+|v5p-\d+|v6e-\d+|tpu7x-\d+',
  'runtime-version': r'tpu-ubuntu2204-base|v2-alpha-tpu\w+(-lite)?', 'version': r'tpu-ubuntu2204-base|v2-alpha-tpu\w+(-lite)?',
  'zone': r'[a-z]+-[a-z]+\d+-[a-z]', 'node-count': r'[2-9]|\d\d+', 'worker': r'all|\d+', 'readonly': 'true|false',
  'auto-mount': 'true|false', 'type': 'gcsfuse', 'format': 'json', 'output': 'json',
  'workload': r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?',
}  # fmt: skip


def refuse(why: str):
  """Print an error and exit with 2, as argparse and gcloud do."""
  print(f'stand-in: ERROR: {why}', file=sys.stderr)
  sys.exit(2)


def flags_of(words: list[str]) -> dict[str, str]:
  """Return {flag: value}. Refuse values that the command would refuse."""
  flags = {}
  for word in words:
    name, equals, value = word.removeprefix('--').partition('=')
    if bool(equals) == (name in SWITCHES):
      refuse(f'{word}: a value is {"not " if equals else ""}expected')
    if name in VALUES and not re.fullmatch(VALUES[name], value):
      refuse(f'{word}: no such value')
    flags[name] = value
  return flags


def check(called: str, flags: dict[str, str], rest: list[str]):
  """Refuse what the real command would refuse."""
  needed, possible, count = TAKES[called]
  wide = WIDE if called.startswith('gcloud') else set()
  if absent := needed - flags.keys():
    refuse(f'{called} needs --{" --".join(sorted(absent))}')
  if unknown := flags.keys() - needed - possible - wide:
    refuse(f'{called} has no --{" --".join(sorted(unknown))}')
  if count is not None and len(rest) != count:
    refuse(f'{called} takes {count} names, got {rest}')
  if called.endswith('queued-resources create') and ('node-id' in flags) == ('node-count' in flags):
    refuse('exactly one of --node-id and --node-count')
  sources = rest[:-1] if called == 'gcloud storage cp' else []
  for path in (
    *sources,
    flags.get('metadata-from-file', '=').partition('=')[2],
    flags.get('script-dir', ''),
  ):
    if path and not Path(path).exists():
      refuse(f'{path} does not exist')


def check_private(flags: dict[str, str]):
  """Refuse a file with values of `--env` that users other than its owner can read."""
  startup = flags.get('metadata-from-file', '=').partition('=')[2]
  for path in filter(None, (startup, flags.get('env-file', ''))):
    if Path(path).stat().st_mode & 0o077:
      refuse(f'others can read {path}')
    if 'env-file' in flags and not re.fullmatch(
      r'(\w+=.*\n)+', Path(path).read_text(encoding='utf-8')
    ):
      refuse(f'{path}: expected NAME=VALUE')
    if Path(flags.get('script-dir', '/')) in Path(path).parents and 'env-file' in flags:
      refuse(f'{path} would become a part of the image')


def next_of(place: Path, play: dict, key: str):
  """Return the next answer for `key`. The last answer repeats."""
  counter = place / f'{re.sub("[^a-z]", "_", key)}.count'
  with counter.open('a+') as file:  # Several processes may call at once.
    fcntl.flock(file, fcntl.LOCK_EX)
    count = file.tell()
    file.write('.')
  return play[key][min(count, len(play[key]) - 1)]


def main():
  """Check and record the call, and print its answer."""
  words = [Path(sys.argv[0]).name, *sys.argv[1:]]
  place = Path(os.environ['STAND_IN'])
  play = json.loads((place / 'play.json').read_text(encoding='utf-8'))
  plain = [word for word in words if not word.startswith('-') or word == '-']
  called = max((name for name in TAKES if ' '.join(plain).startswith(name)), key=len, default=None)
  if called is None:
    refuse(f'no such command: {" ".join(plain[:5])}')
  flags = flags_of([word for word in words if word.startswith('-')])
  check(called, flags, plain[len(called.split()) :])
  check_private(flags)
  with (place / 'calls.jsonl').open('a') as file:
    file.write(json.dumps(words) + '\n')
  code, out, err = next_of(place, play, called) if called in play else [0, '', '']
  print(out, end='')
  print(err, end='', file=sys.stderr)
  sys.exit(code)


if __name__ == '__main__':
  main()
