"""Sphinx configuration. Build with `python -m sphinx -W -b html docs docs/_build`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate

project = 'vit_jax'
author = 'the vit_jax authors'
copyright = '2026, the vit_jax authors'
extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.napoleon',
  'sphinx_copybutton',
]
exclude_patterns = ['_build', '**.ipynb_checkpoints']
html_theme = 'furo'
html_title = 'vit_jax'
html_static_path = ['_static']
myst_enable_extensions = ['colon_fence', 'deflist']
myst_heading_anchors = 3
copybutton_prompt_text = '$ '
nb_execution_mode = 'cache'  # A notebook is executed again only when it has changed.
nb_execution_timeout = 600
nb_execution_raise_on_error = True
# This notebook downloads a checkpoint and photos, unless the environment names local ones.
if 'VIT_JAX_NOTEBOOKS_OFFLINE' in os.environ and 'VIT_JAX_CHECKPOINT' not in os.environ:
  nb_execution_excludepatterns = ['notebooks/load_and_predict.ipynb']
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autosummary_generate = True


def setup(app):
  """Write the generated pages before Sphinx looks for its sources."""
  generate.write_settings()
  generate.write_commands()
  generate.write_recipes()
  generate.draw_imports()
