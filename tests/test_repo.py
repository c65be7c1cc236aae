"""Rules for all files: budgets, plain English, dependencies, and what importing them loads."""

import ast
import dataclasses
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from vit_jax.config import Config

ROOT = Path(__file__).parents[1]
CODE = sorted([*ROOT.glob('vit_jax/**/*.py'), *ROOT.glob('configs/*.py'), *ROOT.glob('run_*.py')])
name_of = lambda path: str(path.relative_to(ROOT))


def depth(node: ast.AST, level: int = 0) -> int:
  """Return the deepest nesting of statements below `node`. A ladder of else-if counts once."""
  deepest = level
  for child in ast.iter_child_nodes(node):
    block = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try)
    ladder = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
    inner = isinstance(child, ast.FunctionDef)
    deepest = max(deepest, depth(child, 0 if inner else level + (block and not ladder)))
  return deepest


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
  """Yield (FILE:LINE NAME, function) for each function of the project."""
  for path in CODE:
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.FunctionDef):
        yield f'{name_of(path)}:{node.lineno} {node.name}', node


def test_files_have_at_most_400_lines():
  lines = {name_of(path): len(path.read_text(encoding='utf-8').splitlines()) for path in CODE}
  assert not {name: count for name, count in lines.items() if count > 400}


def test_functions_have_at_most_50_lines():
  lines = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
  assert not {name: count for name, count in lines.items() if count > 50}


def test_functions_have_at_most_6_positional_arguments():
  args = {
    name: [arg.arg for arg in node.args.posonlyargs + node.args.args if arg.arg != 'self']
    for name, node in functions()
  }
  assert not {name: names for name, names in args.items() if len(names) > 6}


def test_functions_nest_at_most_3_levels():
  levels = {name: depth(node) for name, node in functions()}
  assert not {name: level for name, level in levels.items() if level > 3}


def test_the_root_of_the_package_has_at_most_6_files():
  files = {path.name for path in (ROOT / 'vit_jax').glob('*.py')} - {'__init__.py', '__main__.py'}
  assert len(files) <= 6, files


# Openings of docstrings, and words, that are refused.
OPENINGS = re.compile(r'(Of|What|Whether|Those|As|That|Which|Where|How|Likewise|Goes|So)\b')
WORDS = re.compile(
  r'\b(told|tells of|is said|are said|was said|is asked|was asked|anew|mend(s|ed)?|likewise|thereof'
  r'|so many|goes on|go on|went on|nobody|everybody|somebody|whoever|whichever|of its own)\b',
  re.IGNORECASE,
)


def prose(path: Path) -> Iterator[tuple[str, str, str]]:
  """Yield (FILE:LINE, kind, text) for the docstrings, comments and error messages of a file."""
  source = path.read_text(encoding='utf-8')
  documented = ast.Module | ast.ClassDef | ast.FunctionDef
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, documented) and (text := ast.get_docstring(node)):
      yield f'{name_of(path)}:{node.body[0].lineno}', 'docstring', text
    for part in ast.walk(node.exc) if isinstance(node, ast.Raise) and node.exc else ():
      if isinstance(part, ast.Constant) and isinstance(part.value, str):
        yield f'{name_of(path)}:{part.lineno}', 'message', part.value
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      yield f'{name_of(path)}:{token.start[0]}', 'comment', token.string.lstrip('# ')


def project_prose() -> Iterator[tuple[str, str, str]]:
  """Yield the prose of the package, the recipes and the tests."""
  for path in sorted([*CODE, *ROOT.glob('tests/**/*.py')]):
    yield from prose(path)


def test_docstrings_open_with_an_imperative_or_a_noun_phrase():
  texts = {where: text for where, kind, text in project_prose() if kind == 'docstring'}
  assert not {where: text[:80] for where, text in texts.items() if OPENINGS.match(text)}


def test_prose_uses_plain_words():
  found = [
    (where, match[0]) for where, _, text in project_prose() for match in WORDS.finditer(text)
  ]
  assert not found


def test_text_files_name_their_encoding():
  """Ruff's PLW1514 finds only the calls whose object it can infer."""
  calls = [
    (name_of(path), node.lineno)
    for path in CODE
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
    if isinstance(node, ast.Call)
    and getattr(node.func, 'attr', '') in ('read_text', 'write_text')
    and 'encoding' not in {keyword.arg for keyword in node.keywords}
  ]
  assert not calls


def test_file_names_say_what_is_in_the_file():
  refused = re.compile(r'utils|common|helpers|misc|base_.*|registry|hooks|trainer')
  assert not [name_of(path) for path in CODE if refused.fullmatch(path.stem)]


def test_the_type_of_every_setting_is_a_class_or_a_tuple():
  for cls in (
    type(getattr(Config(), name)) for name in ('data', 'model', 'optim', 'mesh', 'mask', 'lora')
  ):
    for field in dataclasses.fields(cls):
      assert isinstance(field.type, type) or str(field.type).startswith('tuple['), (cls, field.name)


def python(code: str) -> str:
  """Return what a fresh interpreter prints, in which warnings are errors."""
  command = [sys.executable, '-W', 'error', '-c', code]
  out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  return out.strip()


def test_importing_the_package_loads_no_large_library():
  code = 'import sys, vit_jax; print({"jax", "numpy", "tensorflow", "cv2"} & set(sys.modules))'
  assert python(code) == 'set()'


def test_training_never_imports_tensorflow():
  code = 'import sys, vit_jax.train, vit_jax.__main__; print("tensorflow" in sys.modules)'
  assert python(code) == 'False'


def test_the_help_of_a_job_does_not_import_jax():
  code = """
import atexit, runpy, sys
sys.argv = ['run_pretrain.py', '--help']
atexit.register(lambda: print('jax' in sys.modules))
runpy.run_path('run_pretrain.py', run_name='__main__')
"""
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert out.stdout.strip().endswith('False'), out.stderr


def test_only_the_mesh_queries_devices():
  queries = re.compile(r'jax\.(local_)?devices\(|device_count\(|device_kind')
  files = [name_of(path) for path in CODE if queries.search(path.read_text(encoding='utf-8'))]
  assert files == ['vit_jax/sharding/mesh.py']


def requirements() -> list[str]:
  """Return the lines of requirements.txt without comments."""
  lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines()
  return [line for line in lines if line and not line.startswith('#')]


def test_requirements_have_bounds_on_both_sides_and_no_tensorflow():
  assert all(re.fullmatch(r'[\w.-]+>=[\w.]+,<[\w.]+', line) for line in requirements())
  assert not {line for line in requirements() if re.match('tensorflow(-cpu)?[>=]', line)}


def test_the_code_imports_only_what_is_declared():
  modules = {
    'absl-py': 'absl',
    'opencv-python-headless': 'cv2',
    'orbax-checkpoint': 'orbax',
    'pillow': 'PIL',
  }
  names = {line.split('>=')[0] for line in requirements()}
  declared = {modules.get(name, name.replace('-', '_')) for name in names}
  declared |= set(sys.stdlib_module_names) | {'vit_jax', '__future__'}
  declared |= {
    'sklearn',
    'tensorflow',
    'onnx',
    'onnxruntime',
    'pillow_heif',
    'pyarrow',
    'torch',
    'mlflow',
    'wandb',
  }  # Each has a separate extra.
  for path in CODE:
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      imported = []
      if isinstance(node, ast.Import):
        imported = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        imported = [node.module]
      assert {name.split('.')[0] for name in imported} <= declared, name_of(path)


def test_every_line_of_full_tests_names_a_test():
  lines = (ROOT / 'tests' / 'full_tests.txt').read_text(encoding='utf-8').splitlines()
  names = {tuple(line.partition('[')[0].split('::')) for line in lines}
  missing = []
  for file, name in names:
    path = ROOT / file
    if not path.is_file() or f'def {name}(' not in path.read_text(encoding='utf-8'):
      missing.append(f'{file}::{name}')
  assert not missing
