"""A program has its memory in huge pages, where Linux and glibc give them on request."""

import os
import subprocess
import sys

import pytest

from vit_jax.runtime import huge_pages
from vit_jax.runtime.huge_pages import VARIABLE, can_request_huge_pages

PROGRAM = """
import os, re, sys
import numpy as np
from vit_jax.runtime.huge_pages import restart_with_huge_pages
if __name__ == '__main__':
  restart_with_huge_pages()
  array = np.ones(64 * 2**20, np.uint8)
  text = open('/proc/self/smaps_rollup').read()
  print(os.getppid(), sys.argv[1:], sys.flags.dev_mode, os.environ.get('GLIBC_TUNABLES'))
  print(int(re.search(r'AnonHugePages: +([0-9]+) kB', text)[1]))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Return a function that runs PROGRAM, and returns its two lines."""
  monkeypatch.delenv(VARIABLE, raising=False)
  path = tmp_path / 'program.py'
  path.write_text(PROGRAM)

  def run(**environment: str) -> list[str]:
    command = [sys.executable, '-X', 'dev', path, 'a b', '--c=1']
    done = subprocess.run(
      command, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()

  return run


def test_a_program_starts_again_with_its_arguments_and_has_huge_pages(program, monkeypatch):
  monkeypatch.delenv(VARIABLE, raising=False)
  if not can_request_huge_pages():
    pytest.skip('huge pages are not given on request here')
  facts, kilobytes = program()
  assert facts == f"{os.getpid()} ['a b', '--c=1'] True glibc.malloc.hugetlb=1"
  assert int(kilobytes) >= 60 * 2**10


def test_a_choice_of_the_user_is_kept(program):
  facts, _ = program(GLIBC_TUNABLES='glibc.malloc.hugetlb=0')
  assert facts.endswith('True glibc.malloc.hugetlb=0')


@pytest.mark.parametrize(
  ('platform', 'libc', 'pages', 'expected'),
  [
    ('linux', 'glibc 2.35', 'always [madvise] never', True),
    ('linux', 'glibc 2.34', 'always [madvise] never', False),
    ('linux', 'glibc 2.35', '[always] madvise never', False),
    ('linux', 'glibc 2.35', 'always madvise [never]', False),
    ('linux', 'glibc 2.35', None, False),
    ('linux', None, 'always [madvise] never', False),
    ('darwin', 'glibc 2.35', 'always [madvise] never', False),
  ],
)
def test_huge_pages_are_requested_only_where_linux_and_glibc_heed_it(
  tmp_path, monkeypatch, platform, libc, pages, expected
):
  monkeypatch.delenv(VARIABLE, raising=False)
  monkeypatch.setattr(sys, 'platform', platform)
  monkeypatch.setattr(os, 'confstr', lambda name: libc)
  monkeypatch.setattr(huge_pages, '_PAGES', tmp_path / 'enabled')
  if pages is not None:
    (tmp_path / 'enabled').write_text(pages)
  assert can_request_huge_pages() == expected
