"""Generate pages of the documentation: settings, commands, recipes, and the graph of imports.

python docs/generate.py     write the pages without building the documentation
"""

import ast
import dataclasses
import os
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # The pages describe this checkout.

import vit_jax.config
from vit_jax.config import Config
from vit_jax.settings.limits import CHOICES, RANGES

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = 'This page is generated from the code by `docs/generate.py`.\n\n'


def write_page(name: str, text: str):
  """Write a page if it has changed, so that Sphinx does not build it again for nothing."""
  path = DOCS / name
  path.parent.mkdir(exist_ok=True)
  if not path.exists() or path.read_text(encoding='utf-8') != text:
    path.write_text(text, encoding='utf-8')


def field_comments(source: str) -> dict[tuple[str, str], str]:
  """Return {(class, field): the comment above the field} of the dataclasses in a module."""
  lines, found = source.splitlines(), {}
  for cls in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
    for node in cls.body:
      if isinstance(node, ast.AnnAssign):
        first = node.lineno - 1
        while lines[first - 1].lstrip().startswith('#'):
          first -= 1
        comment = ' '.join(line.strip('# ') for line in lines[first : node.lineno - 1])
        found[cls.name, node.target.id] = comment
  return found


def allowed_values(name: str) -> str:
  """Return what a setting may be, beyond its type."""
  if name in CHOICES:
    return ', '.join(f'`{choice}`' if choice else '`""`' for choice in CHOICES[name])
  if name in RANGES:
    low, high = (f'{bound:g}' for bound in RANGES[name])
    return f'{low} to {high}' if high != 'inf' else f'at least {low}'
  return ''


def write_settings():
  """Write reference/settings.md: every setting with its flag, type, default, values and meaning."""
  comments = {}
  for path in sorted(Path(vit_jax.config.__file__).parent.glob('*.py')):
    comments |= field_comments(path.read_text(encoding='utf-8'))
  lines = ['# Settings\n\n', GENERATED]
  lines.append(
    'Every setting is a flag: `--config.optim.lr=0.03`. `vit_jax.config` holds them.\n\n'
  )

  def table(cls, prefix: str):
    lines.append(f'## {prefix.rstrip(".") or "The run"}\n\n{(cls.__doc__ or "").strip()}\n\n')
    lines.append('| setting | type | default | values | meaning |\n|---|---|---|---|---|\n')
    for field in dataclasses.fields(cls):
      if dataclasses.is_dataclass(field.type):
        continue
      name = prefix + field.name
      kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
      cells = [f'`{name}`', kind, f'`{field.default!r}`', allowed_values(name)]
      cells.append(comments.get((cls.__name__, field.name), ''))
      lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |\n')
    lines.append('\n')

  table(Config, '')
  for field in dataclasses.fields(Config):
    if dataclasses.is_dataclass(field.type):
      table(field.type, f'{field.name}.')
  write_page('reference/settings.md', ''.join(lines))


def write_commands():
  """Write reference/commands.md: the help text of every command."""
  os.environ['COLUMNS'] = '100'
  from vit_jax.__main__ import build_parser

  parser = build_parser()
  (commands,) = (action for action in parser._actions if action.choices and action.dest != 'help')
  text = ['# Commands\n\n', GENERATED, '`vit-jax` is the same as `python -m vit_jax`.\n\n']
  for name, command in commands.choices.items():
    text.append(f'## {name}\n\n```text\n{command.format_help().strip()}\n```\n\n')
  write_page('reference/commands.md', ''.join(text))


def write_recipes():
  """Write reference/recipes.md: the header of every file in configs/."""
  text = ['# Recipes\n\n', GENERATED]
  text.append('A recipe is a file in `configs/` whose `get_config` returns a `Config`.\n\n')
  for path in sorted((ROOT / 'configs').glob('*.py')):
    if header := ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))):
      title, _, rest = header.partition('\n')
      text.append(f'## {path.stem}\n\n{title}\n\n```text\n{rest.strip()}\n```\n\n')
  write_page('reference/recipes.md', ''.join(text))


def import_layers() -> list[list[str]]:
  """Return the layers that import-linter holds the package to, the top one first."""
  settings = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
  contracts = settings['tool']['importlinter']['contracts']
  (layers,) = (contract['layers'] for contract in contracts if contract['type'] == 'layers')
  return [[name.strip().removeprefix('vit_jax.') for name in layer.split('|')] for layer in layers]


def package_imports() -> set[tuple[str, str]]:
  """Return the pairs (importer, imported) of the files and folders at the root of the package."""
  import grimp

  graph, pairs = grimp.build_graph('vit_jax'), set()
  for module in graph.modules:
    for imported in graph.find_modules_directly_imported_by(module):
      names = [name.split('.')[1] for name in (module, imported) if '.' in name]
      if len(names) == 2 and names[0] != names[1]:
        pairs.add(tuple(names))
  return pairs


def transitive_reduction(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
  """Return the pairs of an acyclic graph that no longer path connects."""
  reached: dict[str, set[str]] = {}

  def reach(name: str) -> set[str]:
    if name not in reached:
      direct = {end for start, end in pairs if start == name}
      reached[name] = direct.union(*map(reach, direct))
    return reached[name]

  def implied(start: str, end: str) -> bool:
    return any(end in reach(other) for first, other in pairs if first == start and other != end)

  return {pair for pair in pairs if not implied(*pair)}


def draw_imports():
  """Draw _static/imports.svg: a row for each layer, an arrow for each import.

  Imports that a longer path implies are left out.
  """
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure

  layers, pairs = import_layers(), transitive_reduction(package_imports())
  place = {
    name: ((i + 1) / (len(layer) + 1) + 0.06 * (row % 3 - 1), -row)
    for row, layer in enumerate(layers)
    for i, name in enumerate(layer)
  }
  figure = Figure(figsize=(7, 9), layout='constrained')
  FigureCanvasSVG(figure)
  axes = figure.subplots()
  for start, end in sorted(pairs):
    if start in place and end in place:
      arrow = {'arrowstyle': '->', 'color': '#7a8aa0', 'alpha': 0.9, 'lw': 1.0}
      arrow['connectionstyle'] = 'arc3,rad=0.12'
      axes.annotate('', xy=place[end], xytext=place[start], arrowprops=arrow)
  for name, (x, y) in place.items():
    box = {'boxstyle': 'round,pad=0.35', 'fc': '#eef3fb', 'ec': '#4a6fa5'}
    axes.text(x, y, name, ha='center', va='center', fontsize=9, bbox=box)
  axes.set(xlim=(0, 1), ylim=(-len(layers), 0.7))
  axes.axis('off')
  (DOCS / '_static').mkdir(exist_ok=True)
  figure.savefig(DOCS / '_static' / 'imports.svg', metadata={'Date': None})


if __name__ == '__main__':
  write_settings()
  write_commands()
  write_recipes()
  draw_imports()
