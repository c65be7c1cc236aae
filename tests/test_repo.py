"""The rules of the house that a machine can hold: budgets, settings that something reads, no TensorFlow."""

import ast
import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax.config import Config

ROOT = Path(__file__).parents[1]
CODE = sorted([*ROOT.glob('vit_jax/**/*.py'), *ROOT.glob('configs/*.py'), *ROOT.glob('run_*.py')])
name_of = lambda path: str(path.relative_to(ROOT))


def depth(node: ast.AST, level: int = 0) -> int:
  """The deepest nesting of statements below `node`, without counting else-if ladders twice."""
  deepest = level
  for child in ast.iter_child_nodes(node):
    block = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try)
    ladder = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
    inner = isinstance(child, ast.FunctionDef)
    deepest = max(deepest, depth(child, 0 if inner else level + (block and not ladder)))
  return deepest


@pytest.mark.parametrize('path', CODE, ids=name_of)
def test_a_file_keeps_the_budgets(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 400
  for node in ast.walk(ast.parse(text)):
    if not isinstance(node, ast.FunctionDef):
      continue
    lines = node.end_lineno - node.lineno + 1
    assert lines <= (80 if (path.name, node.name) == ('train.py', 'train') else 50), (
      f'{node.name} has {lines} lines'
    )
    assert len([arg for arg in node.args.posonlyargs + node.args.args if arg.arg != 'self']) <= 6, (
      node.name
    )
    assert depth(node) <= 3, f'{node.name} nests {depth(node)} deep'


def test_no_file_has_a_name_that_says_nothing():
  refused = re.compile(r'utils|common|helpers|misc|base_.*|registry|hooks|trainer')
  assert not [name_of(path) for path in CODE if refused.fullmatch(path.stem)]


def test_every_field_has_a_plain_type():
  for cls in (type(getattr(Config(), name)) for name in ('data', 'model', 'optim', 'mesh', 'mask')):
    for field in dataclasses.fields(cls):
      assert isinstance(field.type, type) or str(field.type).startswith('tuple['), (cls, field.name)


def python(code: str) -> str:
  return subprocess.run(
    [sys.executable, '-W', 'error', '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout


def test_importing_the_package_imports_nothing_heavy():
  heavy = python(
    'import sys, vit_jax; print([m for m in ("jax", "numpy", "tensorflow", "cv2") if m in sys.modules])'
  )
  assert heavy.strip() == '[]'


def test_training_never_imports_tensorflow():
  assert (
    python(
      'import sys, vit_jax.train, vit_jax.__main__; print("tensorflow" in sys.modules)'
    ).strip()
    == 'False'
  )


def test_help_is_quick_because_it_does_not_import_jax():
  began = time.monotonic()
  code = 'import sys; sys.argv = ["run_pretrain.py", "--help"]; import atexit; '
  code += 'atexit.register(lambda: print("jax" in sys.modules)); import runpy; runpy.run_path("run_pretrain.py", run_name="__main__")'
  out = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False
  ).stdout
  assert out.strip().endswith('False')
  assert time.monotonic() - began < 20  # A hang; the figure itself belongs to no test.


def test_only_mesh_asks_for_devices():
  asks = re.compile(r'jax\.(local_)?devices\(|device_count\(|device_kind')
  assert [name_of(path) for path in CODE if asks.search(path.read_text())] == [
    'vit_jax/sharding/mesh.py'
  ]


def test_only_checkpoint_imports_orbax():
  assert [name_of(path) for path in CODE if 'import orbax' in path.read_text()] == [
    'vit_jax/checkpoint/io.py'
  ]


def test_requirements_have_bounds_on_both_sides_and_no_tensorflow():
  lines = [
    line
    for line in (ROOT / 'requirements.txt').read_text().splitlines()
    if line and not line.startswith('#')
  ]
  assert all(re.fullmatch(r'[\w.-]+>=[\w.]+,<[\w.]+', line) for line in lines)
  assert not any(
    line.startswith(('tensorflow-cpu', 'tensorflow>', 'tensorflow=')) for line in lines
  )
  assert not any('git+' in line for line in lines)


def test_nothing_installed_here_is_needed_but_the_requirements():
  names = {
    re.split('>=', line)[0]
    for line in (ROOT / 'requirements.txt').read_text().splitlines()
    if '>=' in line
  }
  modules = {
    'absl-py': 'absl',
    'opencv-python-headless': 'cv2',
    'orbax-checkpoint': 'orbax',
    'pillow': 'PIL',
  }
  provided = (
    {modules.get(name, name.replace('-', '_')) for name in names}
    | set(sys.stdlib_module_names)
    | {'vit_jax', '__future__'}
  )
  optional = {'sklearn', 'tensorflow', 'onnx', 'onnxruntime'}  # Each in an extra of its own.
  for path in CODE:
    for node in ast.walk(ast.parse(path.read_text())):
      found = (
        [a.name for a in node.names]
        if isinstance(node, ast.Import)
        else [node.module]
        if isinstance(node, ast.ImportFrom)
        else []
      )
      assert {name.split('.')[0] for name in found} <= provided | optional, name_of(path)
