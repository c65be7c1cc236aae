"""Adapters: merged into every model that is loaded, and written and read as a file of their own."""

import json
import shutil
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import vit_jax
from tests.pretrained.released_layout import draw, google_file
from vit_jax.__main__ import build_parser
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.checkpoint.run_directory import write_run_description
from vit_jax.config import Config, DataConfig, LoraConfig, ModelConfig
from vit_jax.config_checks import validate
from vit_jax.errors import UserError
from vit_jax.models.families import build_model
from vit_jax.models.lora import LoraModel, is_adapter
from vit_jax.pretrained.adapt import adapt_params
from vit_jax.pretrained.adapters import write_adapters
from vit_jax.pretrained.export import export_model
from vit_jax.step import TrainState, abstract_params

MODEL = ModelConfig(variant='mu/8', depth=2, heads=4)
SIZE, CLASSES = (32, 32), 5
IMAGES = np.random.default_rng(1).integers(0, 256, (3, *SIZE, 3), np.uint8)
LABELS = tuple(f'class {i}' for i in range(CLASSES))
LORA = LoraConfig(rank=3, alpha=6.0, targets='.*(query|out|Dense_1|embedding)/kernel')


def config_of(base: Path, **fields) -> Config:
  data = DataConfig(train='folder:photos', size=SIZE, batch=8)
  return validate(Config(data=data, model=MODEL, lora=LORA, init=str(base), steps=1, **fields))


def write_run(workdir: Path, config: Config) -> dict:
  """Write a run whose adapters and head are random, and return its parameters."""
  model = build_model(config.model, CLASSES)
  blank = draw(config.model, CLASSES, SIZE, seed=3)
  loaded = vit_jax.load(config.init)
  params, _ = adapt_params(
    loaded.params,
    flax.traverse_util.unflatten_dict(blank, sep='/'),
    grid=model.shape.grid(SIZE),
    old_grid=loaded.grid,
  )
  rng = np.random.default_rng(4)
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  if config.lora.rank:
    shapes = abstract_params(LoraModel(model, config.lora), SIZE)
    for path, leaf in flax.traverse_util.flatten_dict(shapes, sep='/').items():
      if is_adapter(path):
        flat[path] = 0.1 * rng.standard_normal(leaf.shape, np.float32)
  params = flax.traverse_util.unflatten_dict(flat, sep='/')
  state = TrainState(step=jnp.int32(1), params=params, opt_state=(), ema=None)
  write_run_description(workdir, config, LABELS)
  CheckpointManager(workdir).finish(state, 1)
  return params


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('base') / 'base.npz'
  google_file(path, MODEL, classes=9, size=(24, 24))
  return path


@pytest.fixture(scope='module')
def run(base, tmp_path_factory) -> tuple[Path, dict]:
  workdir = tmp_path_factory.mktemp('run') / 'run'
  return workdir, write_run(workdir, config_of(base))


@pytest.fixture(scope='module')
def file(run, tmp_path_factory) -> Path:
  to = tmp_path_factory.mktemp('file') / 'adapters.safetensors'
  write_adapters(run[0], to)
  return to


def unmerged_logits(params: dict) -> np.ndarray:
  model = LoraModel(build_model(MODEL, CLASSES), LORA)
  return np.asarray(jax.jit(model.apply)({'params': params}, IMAGES))


def test_a_loaded_run_has_the_parameters_of_a_model_without_adapters_and_equal_logits(run):
  workdir, params = run
  model = vit_jax.load(str(workdir))
  assert not [p for p in flax.traverse_util.flatten_dict(model.params, sep='/') if is_adapter(p)]
  expected = unmerged_logits(params)
  np.testing.assert_allclose(model.logits(IMAGES), expected, rtol=0, atol=1e-6)
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  without = {p: 0 * x if is_adapter(p) else x for p, x in flat.items()}
  base_logits = unmerged_logits(flax.traverse_util.unflatten_dict(without, sep='/'))
  assert np.abs(expected - base_logits).max() > 0.01


@pytest.mark.parametrize(('format', 'name'), [('npz', 'm.npz'), ('timm', 'm')])
def test_an_export_has_the_merged_kernels(run, tmp_path, format, name):
  workdir, params = run
  export_model(vit_jax.load(str(workdir)), tmp_path / name, format)
  logits = vit_jax.load(str(tmp_path / name)).logits(IMAGES)
  np.testing.assert_allclose(logits, unmerged_logits(params), rtol=0, atol=2e-6)


def test_the_file_has_the_adapters_and_the_head_and_restores_the_run(run, file):
  workdir, params = run
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  kept = {path for path in flat if is_adapter(path) or path.startswith('head/')}
  assert set(load_file(file)) == kept
  assert file.stat().st_size < sum(flat[path].nbytes for path in kept) + 6000
  theirs, ours = vit_jax.load(str(workdir)), vit_jax.load(str(file))
  assert (ours.labels, ours.config, ours.preprocessing) == (
    LABELS,
    theirs.config,
    theirs.preprocessing,
  )
  np.testing.assert_array_equal(ours.logits(IMAGES), theirs.logits(IMAGES))


def test_the_metadata_name_the_base_rank_alpha_and_labels(file, base):
  with safe_open(file, 'numpy') as stream:
    facts = json.loads(stream.metadata()['vit_jax'])
  assert facts['base'] == str(base)
  assert (facts['lora']['rank'], facts['lora']['alpha']) == (3, 6.0)
  assert facts['labels'] == list(LABELS)


def test_a_base_that_has_moved_can_be_named(file, base, tmp_path):
  lost, moved = tmp_path / 'adapters.safetensors', tmp_path / 'moved.npz'
  rewrite(file, lost, base=str(tmp_path / 'gone.npz'))
  with pytest.raises(UserError, match=r'gone\.npz.*--base'):
    vit_jax.load(str(lost))
  shutil.copy(base, moved)
  np.testing.assert_array_equal(
    vit_jax.load(str(lost), base=str(moved)).logits(IMAGES), vit_jax.load(str(file)).logits(IMAGES)
  )


def rewrite(file: Path, to: Path, arrays: dict | None = None, **changes):
  """Copy a file of adapters with other facts or arrays."""
  with safe_open(file, 'numpy') as stream:
    metadata = stream.metadata()
  facts = json.loads(metadata['vit_jax']) | changes
  metadata['vit_jax'] = json.dumps(facts)
  save_file(load_file(file) | (arrays or {}), to, metadata=metadata)


def test_another_model_of_the_same_shape_is_refused_as_base(file, tmp_path):
  google_file(tmp_path / 'other.npz', MODEL, classes=9, size=(24, 24), seed=1)
  with pytest.raises(UserError, match=r'other\.npz is another model'):
    vit_jax.load(str(file), base=str(tmp_path / 'other.npz'))


def test_a_model_of_another_shape_is_refused_as_base(file, tmp_path):
  config = ModelConfig(variant='mu/8', depth=3, heads=4)
  google_file(tmp_path / 'deep.npz', config, classes=9, size=(24, 24))
  with pytest.raises(UserError, match=r'deep\.npz is another model'):
    vit_jax.load(str(file), base=str(tmp_path / 'deep.npz'))


def test_an_array_of_the_wrong_shape_is_named(file, tmp_path):
  name = 'Transformer/encoderblock/MlpBlock_3/Dense_1/lora_b'
  changed = tmp_path / 'changed.safetensors'
  rewrite(file, changed, {name: np.zeros((2, 4, 7), np.float32)})
  with pytest.raises(UserError, match=rf'{name} is \[2, 4, 7\]'):
    vit_jax.load(str(changed))


def test_metadata_of_another_version_are_refused(file, tmp_path):
  changed = tmp_path / 'changed.safetensors'
  rewrite(file, changed, lora={'rank': 3, 'dropout': 0.1})
  with pytest.raises(UserError, match=r'changed\.safetensors.*dropout'):
    vit_jax.load(str(changed))


def test_a_base_is_refused_for_a_model_that_needs_none(base):
  with pytest.raises(UserError, match='base='):
    vit_jax.load(str(base), base=str(base))


def export(*args: str):
  parsed = build_parser().parse_args(['export', *args])
  parsed.function(parsed)


def test_the_command_writes_the_file(run, file, tmp_path, capsys):
  export('--init', str(run[0]), '--to', str(tmp_path / 'a.safetensors'), '--adapters')
  assert load_file(tmp_path / 'a.safetensors').keys() == load_file(file).keys()
  assert 'a.safetensors: ' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('args', 'named'),
  [
    (['--to', 'a.npz'], 'safetensors'),
    (['--to', 'a.safetensors', '--format', 'npz'], '--format'),
    (['--to', 'a.safetensors', '--dtype', 'bfloat16'], '--dtype'),
  ],
)
def test_flags_that_adapters_do_not_read_are_refused(run, args, named):
  with pytest.raises(UserError, match=named):
    export('--init', str(run[0]), '--adapters', *args)


def test_a_run_or_file_without_adapters_is_refused(base, tmp_path):
  with pytest.raises(UserError, match='not a run directory'):
    write_adapters(base, tmp_path / 'a.safetensors')
  full = Config(data=config_of(base).data, model=MODEL, init=str(base), steps=1)
  write_run(tmp_path / 'full', validate(full))
  with pytest.raises(UserError, match=r'lora\.rank=0'):
    write_adapters(tmp_path / 'full', tmp_path / 'a.safetensors')
