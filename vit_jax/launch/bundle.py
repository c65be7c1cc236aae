"""The files of a launch.

A commit as it is in git, the package versions that are installed here, and the start script.
"""

import contextlib
import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.launch.environment import pack_environment
from vit_jax.launch.job import Job
from vit_jax.launch.script import start_script
from vit_jax.runtime.files import write_atomically


@contextlib.contextmanager
def launch_folder() -> Iterator[str]:
  """Yield a folder in a temporary one that only this user can enter, and remove both at the end.

  Raises UserError if its path has a meaning in the commands of gcloud or xpk.
  """
  with tempfile.TemporaryDirectory(prefix='vit_jax-') as parent:
    files = Path(parent) / 'files'
    if not re.fullmatch(r'[\w./+@-]+', parent):
      raise UserError(
        f'the temporary folder {parent} has a character that gcloud or xpk cannot take; set TMPDIR '
        'to a folder of letters, digits and - _ . + @'
      )
    files.mkdir()
    yield str(files)


def make_start_files(job: Job) -> dict[str, str]:
  """Return {'/start.sh': its text}, and for GKE {'.env': its text}, to be written after FILES.

  Raises UserError if one is too long for the cloud.
  """
  packed = {'.env': pack_environment(job.env)} if job.backend == 'gke' else {}
  return {'/start.sh': start_script(job)} | packed


def write_start_files(job: Job, files: str):
  """Write FILES/start.sh, and for GKE FILES.env, so that only this user can read them."""
  for name, text in make_start_files(job).items():
    write_atomically(Path(f'{files}{name}'), text, private=True)


def resolve_commit(root: Path, *, allow_dirty: bool) -> tuple[str, str]:
  """Return (the hash of HEAD, the changed files that it does not contain).

  Raises UserError if there are such files and `allow_dirty` is False.
  """
  changed = run_git(root, 'status', '--porcelain').splitlines()
  files = ', '.join(line[3:] for line in changed[:5]) + (
    f' and {len(changed) - 5} more' if len(changed) > 5 else ''
  )
  if changed and not allow_dirty:
    raise UserError(
      f'not in the commit that would be launched: {files}. Commit them, or launch without them '
      'with --allow_dirty'
    )
  return run_git(root, 'rev-parse', 'HEAD').strip()[:12], files


def checkout_root(folder: Path) -> Path:
  """Return the root of the checkout that contains `folder`. Raises UserError if there is none."""
  return Path(run_git(folder, 'rev-parse', '--show-toplevel').strip())


def run_git(folder: Path, *args: str) -> str:
  """Run git and return its output. Raises UserError if it fails."""
  done = subprocess.run(['git', *args], cwd=folder, capture_output=True, text=True, check=False)
  if done.returncode:
    raise UserError(
      f'git {" ".join(args)} in {folder}: {done.stderr.strip()}; launch from a checkout of the code'
    )
  return done.stdout


def archive_command(root: Path, commit: str, files: str) -> list[str]:
  """Return the command that packs a commit into FILES/code.tar.gz."""
  return [
    'git',
    '-C',
    str(root),
    'archive',
    '--format=tar.gz',
    f'--output={files}/code.tar.gz',
    commit,
  ]


def format_pins(root: Path) -> str:
  """Return requirements.txt with the installed versions, and jaxlib's, which follows jax's."""
  lines = (root / 'requirements.txt').read_text(encoding='utf-8').splitlines()
  names = [
    re.split(r'[<>=~!\[]', line)[0].strip() for line in lines if line and not line.startswith('#')
  ]
  return ''.join(
    f'{name}=={importlib.metadata.version(name)}\n' for name in sorted({*names, 'jaxlib'})
  )
