"""The code that is launched: a commit as it is in git, and the versions that are installed here."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

from vit_jax.errors import UserError


def commit(root: Path, *, allow_dirty: bool) -> tuple[str, str]:
  """(HEAD's commit, what of the working tree it leaves out). UserError where that is not allowed to be anything."""
  changed = git(root, 'status', '--porcelain').splitlines()
  files = ', '.join(line[3:] for line in changed[:5]) + (
    f' and {len(changed) - 5} more' if len(changed) > 5 else ''
  )
  if changed and not allow_dirty:
    raise UserError(
      f'not in the commit that would be launched: {files}. Commit it, or launch without it with --allow_dirty'
    )
  return git(root, 'rev-parse', 'HEAD').strip()[:12], files


def toplevel(folder: Path) -> Path:
  """The root of the checkout that `folder` is in. UserError where it is in none."""
  return Path(git(folder, 'rev-parse', '--show-toplevel').strip())


def git(folder: Path, *args: str) -> str:
  """What git says."""
  done = subprocess.run(['git', *args], cwd=folder, capture_output=True, text=True, check=False)
  if done.returncode:
    raise UserError(
      f'git {" ".join(args)} in {folder}: {done.stderr.strip()}; launch from a checkout of the code'
    )
  return done.stdout


def archive(root: Path, commit: str, files: str) -> list[str]:
  """The command that packs the commit."""
  return [
    'git',
    '-C',
    str(root),
    'archive',
    '--format=tar.gz',
    f'--output={files}/code.tar.gz',
    commit,
  ]


def pins(root: Path) -> str:
  """requirements.txt with the versions that are installed here, a line each, and jaxlib's, which follows jax's."""
  lines = (root / 'requirements.txt').read_text().splitlines()
  names = [
    re.split(r'[<>=~!\[]', line)[0].strip() for line in lines if line and not line.startswith('#')
  ]
  return ''.join(
    f'{name}=={importlib.metadata.version(name)}\n' for name in sorted({*names, 'jaxlib'})
  )
