"""Cycles of a program from an independent script. Tests are skipped if it is absent."""

import collections
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT.parent / 'shared' / 'tools' / 'tpu_cycles.py'


def independent_script():
  """Return the script as a module, or skip the test if it is absent."""
  if not SCRIPT.is_file():
    pytest.skip(f'no {SCRIPT}')
  spec = importlib.util.spec_from_file_location('tpu_cycles', SCRIPT)
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  return script


def independent_cycles(hlo: str, *, directory: Path, **kernel) -> int:
  """Return the cycles of a program whose kernels are the attention of `kernel`'s shape."""
  from vit_jax.cli.plan import QUIET_TPU_ENVIRONMENT

  script, dump = independent_script(), directory / 'llo'
  flags = {'LIBTPU_INIT_ARGS': f'--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true'}
  code = f'from vit_jax.tpu.hlo_kernels import compile_kernels; compile_kernels({kernel!r})'
  subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | QUIET_TPU_ENVIRONMENT | flags,
    check=True,
    cwd=ROOT,
  )
  bodies, entry = script.computations(hlo)
  # The names of kernels in the dump have the prefix of differentiation, as in
  # jvp_attention_forward_; those in the program have not.
  for path in dump.glob('*attention_*'):
    path.rename(
      path.with_name(re.sub(r'-[a-z_]*(attention_(?:forward|backward))_*\.', r'-\1.', path.name))
    )
  missing = []
  cycles = script.total(bodies, entry, dump, collections.Counter(), missing)
  assert not missing
  return cycles
