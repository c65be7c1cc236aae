"""Exports: other libraries compute our numbers from them, and `load` restores the model."""

import dataclasses
import errno
import subprocess
import sys
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import pytest
from safetensors import SafetensorError

import vit_jax
from tests.pretrained.families import POOLS, normalised, run, timm_model
from tests.pretrained.released_layout import draw, google_file
from vit_jax.cli.arguments import MODEL_FLAGS
from vit_jax.cli.export import FORMATS
from vit_jax.config import ModelConfig
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.errors import UserError
from vit_jax.pretrained import export as module
from vit_jax.pretrained.equivalents import OPTIONAL_BIASES, add_zero_biases, to_plain
from vit_jax.pretrained.export import export_model
from vit_jax.pretrained.huggingface_export import with_layer_scale
from vit_jax.pretrained.loading import LOAD_OVERRIDES
from vit_jax.pretrained.model import PretrainedModel

IMAGES = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
STATISTICS = {'mean': (123.675, 116.28, 103.53), 'scale': (58.395, 57.12, 57.375)}


def model(
  *, variant: str = 'mu/8', classes: int = 5, size: tuple[int, int] = (32, 32), **fields
) -> PretrainedModel:
  """Return a random model with unusual preprocessing, so that any loss of it shows."""
  fields = {'depth': 2, 'heads': 4, **STATISTICS} | fields
  config = ModelConfig(variant=variant, **fields)
  return PretrainedModel(
    source='drawn',
    params=flax.traverse_util.unflatten_dict(draw(config, classes, size), sep='/'),
    config=config,
    classes=classes,
    preprocessing=Preprocessing(
      size=size,
      crop='center',
      resize_size=(size[0] * 5 // 4, size[1] * 5 // 4),
      interpolation='pil_bicubic',
      jpeg_dct='accurate',
      channels=config.channels,
      mean=config.mean,
      scale=config.scale,
    ),
    labels=tuple(f'é{i}' for i in range(classes)),
  )


SCALED = {'layer_scale': 1e-5}
HYBRID = {'variant': 'R1.1+mu/8', 'stem_width': 32}
MODELS = {
  'class token': {},
  'erf': {'gelu': 'erf'},
  'epsilon': {'norm_eps': 1e-5},
  'mean': {'pool': 'gap'},
  'MAP': {'pool': 'map'},
  'hidden layer': {'hidden_head': True},
  'no head': {'classes': 0},
  'hidden layer, no head': {'classes': 0, 'hidden_head': True},
  'registers': {'registers': 3},
  'registers, no head': {'registers': 3, 'classes': 0},
  'patch norm': {'patch_norm': True},
  'sincos': {'position': 'sincos2d', 'pool': 'gap'},
  'no positions': {'position': 'none'},
  'bfloat16': {'dtype': 'bfloat16'},
  'not square': {'variant': 'mu/8x4', 'size': (32, 16)},
  'DINOv3': {'position': 'rope', 'registers': 2, 'qkv_bias': 'qv', **SCALED, 'classes': 0},
  'DINOv3 with a gated MLP': {
    'position': 'rope',
    'rope_theta': 50.0,
    'swiglu': True,
    'gelu': 'tanh',
    **SCALED,
    'classes': 0,
  },
  'DINOv2 giant': {'swiglu': True, 'mlp': 88, **SCALED, 'classes': 0},
  'LayerScale and a head': SCALED,
  'CLIP': {'pre_norm': True, 'patch_bias': False, 'gelu': 'quick', 'norm_eps': 1e-5},
  'fc_norm': {'pool': 'gap', 'class_token': True, 'fc_norm': True, 'registers': 1},
  'class token that is not pooled': {'pool': 'gap', 'class_token': True},
  'norms of queries and keys': {'qk_norm': True, 'qkv_bias': 'none'},
  'biases of queries and values': {'qkv_bias': 'qv', 'patch_bias': False},
  'distilled DeiT': {'distillation_token': True},
  'distilled DeiT, no head': {'distillation_token': True, 'classes': 0},
  'BEiT': {
    'position': 'relative2d',
    'qkv_bias': 'qv',
    'pool': 'gap',
    'class_token': True,
    'fc_norm': True,
  },
  'EVA-02': {
    'position': 'learned+rope',
    'rope_grid': 4,
    'swiglu': True,
    'gelu': 'tanh',
    'mlp_norm': True,
  },
  'ViT-5': {
    'position': 'learned+rope',
    'rope_grid': 4,
    'registers': 4,
    'rope_register_theta': 10.0,
    'norm': 'rmsnorm',
    'qk_norm': True,
    'qkv_bias': 'none',
    **SCALED,
  },
  'hybrid': HYBRID,
  'root': {'variant': 'R+mu/16', 'stem_width': 32},
}
# The models that a format does not support.
UNSUPPORTED = {
  'npz': (
    'registers', 'registers, no head', 'patch norm', 'DINOv3', 'DINOv3 with a gated MLP',
    'DINOv2 giant', 'CLIP', 'fc_norm', 'class token that is not pooled',
    'norms of queries and keys', 'distilled DeiT', 'distilled DeiT, no head', 'BEiT', 'EVA-02',
    'ViT-5',
  ),
  'timm': (
    'DINOv3', 'DINOv3 with a gated MLP', 'hidden layer', 'hidden layer, no head', 'patch norm',
    'hybrid', 'root', 'BEiT', 'EVA-02', 'ViT-5',
  ),
  'huggingface': (
    'mean', 'MAP', 'hidden layer', 'registers', 'patch norm', 'sincos', 'not square', 'hybrid',
    'root', 'CLIP', 'fc_norm', 'class token that is not pooled', 'norms of queries and keys',
    'BEiT', 'EVA-02', 'ViT-5',
  ),
  'stablehlo': (),
  'onnx': (),
}  # fmt: skip
# Exports that rewrite the parameters for another model of the same function.
ADD_BIASES = lambda flat: add_zero_biases(flat, OPTIONAL_BIASES)
REWRITTEN = {
  ('npz', 'LayerScale and a head'): to_plain,
  ('huggingface', 'LayerScale and a head'): to_plain,
  ('npz', 'biases of queries and values'): to_plain,
  ('huggingface', 'registers, no head'): with_layer_scale,
  ('timm', 'biases of queries and values'): ADD_BIASES,
  ('huggingface', 'biases of queries and values'): ADD_BIASES,
}
NAMES = {'npz': 'model.npz', 'stablehlo': 'model.stablehlo', 'onnx': 'model.onnx'}


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('format', UNSUPPORTED)
def test_an_export_restores_the_model_or_raises_one_line(tmp_path, format, kind):
  for package in module.REQUIRED_PACKAGES.get(format, ()):
    pytest.importorskip(package)
  ours, to = model(**MODELS[kind]), tmp_path / 'below' / NAMES.get(format, 'directory')
  if kind in UNSUPPORTED[format]:
    with pytest.raises(UserError) as error:
      export_model(ours, to, format)
    assert '\n' not in str(error.value)
    assert [*tmp_path.rglob('*')] in ([], [to.parent])
    return
  (line,) = export_model(ours, to, format)
  assert str(to) in line
  assert 'relative error' in line
  assert {path.name for path in to.parent.iterdir()} == {to.name} | (
    {'model.json'} if format == 'npz' else set()
  )
  if format not in ('stablehlo', 'onnx') and kind not in (
    'sincos',
    'no positions',
  ):  # These become a learned table.
    assert_same_model(vit_jax.load(str(to)), ours, as_stored=REWRITTEN.get((format, kind)))


@pytest.mark.parametrize('format', sorted({*UNSUPPORTED} - {'stablehlo'}))
def test_positions_inside_the_blocks_are_exported_only_to_stablehlo(tmp_path, format):
  for fields in ({'position': 'learned2d'}, {'position': 'relative'}, {'position_at': 'shared'}):
    with pytest.raises(UserError, match='position embeddings .* stablehlo'):
      export_model(model(**fields), tmp_path / NAMES.get(format, 'directory'), format)
  assert list(tmp_path.iterdir()) == []


def assert_same_model(again: PretrainedModel, ours: PretrainedModel, as_stored=None):
  """Compare all arrays bit for bit, after `as_stored` of ours, and the known facts."""
  expected = ours.params
  if as_stored:
    flat = as_stored(flax.traverse_util.flatten_dict(expected, sep='/'))
    expected = flax.traverse_util.unflatten_dict(flat, sep='/')
  jax.tree.map(np.testing.assert_array_equal, again.params, expected)
  same = (
    'gelu', 'norm_eps', 'mean', 'scale', 'pool', 'hidden_head', 'registers', 'position',
    'rope_theta', 'class_token', 'fc_norm', 'pre_norm', 'qk_norm', 'swiglu', 'distillation_token',
  )  # fmt: skip
  assert {name: getattr(again.config, name) for name in same} == {
    name: getattr(ours.config, name) for name in same
  }
  assert again.model.shape == ours.model.shape
  assert again.labels == ours.labels
  # timm and transformers each have one way to round, which their files do not state.
  rounding = again.preprocessing.rounding
  assert again.preprocessing == dataclasses.replace(ours.preprocessing, rounding=rounding)


@pytest.mark.parametrize(
  'kind',
  [
    'class token', 'erf', 'epsilon', 'mean', 'MAP', 'no head', 'registers', 'sincos', 'not square',
    'DINOv2 giant', 'LayerScale and a head', 'CLIP', 'fc_norm', 'class token that is not pooled',
    'norms of queries and keys', 'biases of queries and values', 'distilled DeiT',
  ],
)  # fmt: skip
def test_timm_computes_our_outputs_from_an_export(tmp_path, kind, timm):
  import torch

  ours = model(**MODELS[kind])
  export_model(ours, tmp_path / 'timm', 'timm')
  theirs = timm.create_model(f'local-dir:{tmp_path / "timm"}', pretrained=True).eval()
  images = IMAGES[:, : ours.size[0], : ours.size[1]]
  with torch.no_grad():
    expected = theirs(normalised(images, **STATISTICS)).numpy()
  got = np.asarray((ours.logits if ours.classes else ours.features)(images))
  assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()
  assert theirs.pretrained_cfg['mean'] == pytest.approx((0.485, 0.456, 0.406))
  assert theirs.pretrained_cfg['crop_pct'] == pytest.approx(max(ours.size) / 40)


@pytest.mark.parametrize(
  'kind',
  [
    'class token', 'erf', 'epsilon', 'no head', 'hidden layer, no head', 'registers, no head',
    'DINOv3', 'DINOv3 with a gated MLP', 'DINOv2 giant', 'LayerScale and a head',
    'biases of queries and values', 'distilled DeiT',
  ],
)  # fmt: skip
def test_transformers_computes_our_outputs_from_an_export(tmp_path, kind, transformers):
  import torch

  ours = model(**MODELS[kind])
  export_model(ours, tmp_path / 'hub', 'huggingface')
  auto = transformers.AutoModelForImageClassification if ours.classes else transformers.AutoModel
  if kind == 'distilled DeiT':  # The automatic class reads one of its tokens.
    auto = transformers.DeiTForImageClassificationWithTeacher
  theirs, info = auto.from_pretrained(tmp_path / 'hub', output_loading_info=True)
  assert not info['unexpected_keys']
  assert not set(info['missing_keys']) - (
    {'pooler.dense.weight', 'pooler.dense.bias'} if kind == 'no head' else set()
  )
  with torch.no_grad():
    out = theirs.eval()(normalised(IMAGES, **STATISTICS))
  if ours.classes:
    assert theirs.config.id2label[1] == 'é1'
    expected = out.logits
  elif kind == 'no head':  # Its pooler has random weights.
    expected = out.last_hidden_state[:, 0]
  else:
    expected = out.pooler_output
  got = np.asarray((ours.logits if ours.classes else ours.features)(IMAGES))
  assert np.abs(got - expected.numpy()).max() <= 2e-5 * np.abs(expected.numpy()).max()


@pytest.mark.parametrize('kind', ['class token', 'MAP', 'hybrid'])
def test_stablehlo_runs_without_vit_jax_at_any_batch_size(tmp_path, kind):
  pytest.importorskip('flatbuffers')
  ours = model(**MODELS[kind])
  export_model(ours, tmp_path / 'model.stablehlo', 'stablehlo')
  np.save(tmp_path / 'images.npy', IMAGES)
  code = (
    'import sys, numpy as np, jax, jax.export; '
    'model = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read())); '
    'images = np.load("images.npy"); '
    'np.savez("out.npz", one=model.call(images[:1]), three=model.call(images)); '
    'assert "vit_jax" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, timeout=120)
  with np.load(tmp_path / 'out.npz') as out:
    expected = np.asarray(ours.logits(IMAGES))
    np.testing.assert_allclose(out['three'], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(out['one'], expected[:1], rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('kind', ['class token', 'erf', 'hybrid'])
def test_onnx_runs_at_any_batch_size(tmp_path, kind):
  onnxruntime = pytest.importorskip('onnxruntime')
  import onnx

  ours = model(**MODELS[kind])
  export_model(ours, tmp_path / 'model.onnx', 'onnx')
  onnx.checker.check_model(onnx.load(tmp_path / 'model.onnx'), full_check=True)
  session = onnxruntime.InferenceSession(
    tmp_path / 'model.onnx', providers=['CPUExecutionProvider']
  )
  assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
    ('images', 'tensor(uint8)', ['b', 32, 32, 3])
  ]
  expected = np.asarray(ours.logits(IMAGES))
  for b in (1, 3):
    (got,) = session.run(['logits'], {'images': IMAGES[:b]})
    np.testing.assert_allclose(got, expected[:b], rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('kind', ['class token', 'mean', 'MAP', 'sincos', 'no positions'])
def test_timm_reads_an_exported_npz(tmp_path, kind, timm):
  ours = model(**MODELS[kind])
  export_model(ours, tmp_path / 'model.npz', 'npz')
  pool = {} if ours.config.pool == 'token' else POOLS[ours.config.pool]
  theirs = timm_model(timm, ours.config, ours.classes, ours.size, **pool)
  theirs.load_pretrained(str(tmp_path / 'model.npz'))
  expected = run(theirs, IMAGES, **STATISTICS)
  assert np.abs(np.asarray(ours.logits(IMAGES)) - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize('kind', ['hidden layer', 'hybrid'])
def test_exporting_a_released_file_preserves_every_bit(tmp_path, kind):
  config = ModelConfig(
    **{'variant': 'mu/8', 'depth': 11} | MODELS[kind]
  )  # More than ten, so that sorting names as text would be wrong.
  google_file(tmp_path / 'released.npz', config, classes=5, size=(32, 32))
  export_model(vit_jax.load(str(tmp_path / 'released.npz')), tmp_path / 'again.npz', 'npz')
  with np.load(tmp_path / 'released.npz') as old, np.load(tmp_path / 'again.npz') as new:
    described = lambda file: {
      name: (file[name].shape, file[name].dtype, file[name].tobytes()) for name in file
    }
    assert described(new) == described(old)
    assert kind != 'hybrid' or new['gn_root/scale'].shape == (1, 1, 1, 32)


@pytest.mark.parametrize('format', UNSUPPORTED)
def test_an_export_with_other_outputs_leaves_the_old_file(tmp_path, monkeypatch, format):
  if format == 'onnx':
    pytest.importorskip('onnxruntime')
  write, read = module.EXPORT_FORMATS[format]

  def corrupting(ours: PretrainedModel, to: Path, **options):
    head = {'kernel': ours.params['head']['kernel'] * 1.001, 'bias': ours.params['head']['bias']}
    write(dataclasses.replace(ours, params=ours.params | {'head': head}), to, **options)

  to = tmp_path / NAMES.get(format, 'directory')
  export_model(model(), to, format)
  before = contents(tmp_path)
  monkeypatch.setitem(module.EXPORT_FORMATS, format, (corrupting, read))
  with pytest.raises(UserError, match=r'relative error .* 1e-04'):
    export_model(model(), to, format)
  assert contents(tmp_path) == before


def test_an_export_that_differs_only_on_textured_images_raises(tmp_path, monkeypatch):
  """A kernel change that sums to zero over a patch is invisible on images of one color."""
  write, read = module.EXPORT_FORMATS['npz']

  def corrupting(ours: PretrainedModel, to: Path):
    kernel = ours.params['embedding']['kernel'].copy()
    kernel[0, 0, 0, 0] += 1
    kernel[0, 1, 0, 0] -= 1
    embedding = ours.params['embedding'] | {'kernel': kernel}
    write(dataclasses.replace(ours, params=ours.params | {'embedding': embedding}), to)

  monkeypatch.setitem(module.EXPORT_FORMATS, 'npz', (corrupting, read))
  with pytest.raises(UserError, match='relative error'):
    export_model(model(), tmp_path / 'model.npz', 'npz')


def contents(folder: Path) -> dict[str, bytes]:
  """Return the content of every file below a folder."""
  return {
    str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()
  }


FULL = {
  'npz': ('np.savez', OSError(errno.ENOSPC, 'No space left on device')),
  'timm': ('save_file', SafetensorError('I/O error: No space left on device')),
}


@pytest.mark.parametrize('format', FULL)
def test_a_full_disk_raises_one_line_and_leaves_nothing(tmp_path, monkeypatch, format):
  def full(*args, **kwargs):
    raise error

  name, error = FULL[format]
  monkeypatch.setattr(f'{module.__name__}.{name}', full)
  with pytest.raises(UserError, match=r'^cannot write .*: .*No space left on device$'):
    export_model(model(), tmp_path / NAMES.get(format, 'directory'), format)
  assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_only_earlier_exports(tmp_path):
  for format in ('huggingface', 'timm', 'timm'):
    export_model(model(), tmp_path / 'directory', format)
    export_model(model(), tmp_path / 'model.npz', 'npz')
  assert {path.name for path in (tmp_path / 'directory').iterdir()} == {
    'model.safetensors',
    'config.json',
  }
  assert (
    len({path.stat().st_mode for path in tmp_path.rglob('*') if path.is_file()}) == 1
  )  # The mode of the umask.
  (tmp_path / 'directory' / 'README.md').write_text('mine', encoding='utf-8')
  (tmp_path / 'other.json').write_text('mine', encoding='utf-8')
  before = contents(tmp_path)
  refused = {
    'README.md': ('directory', 'timm'),
    'is a directory, but npz': ('directory', 'npz'),
    'is a file, but timm': ('model.npz', 'timm'),
    'other.json': ('other.npz', 'npz'),
    'ends in .npz': ('model', 'npz'),
    'Did you mean': ('x', 'tim'),
    'cannot write': ('model.npz/x.npz', 'npz'),
  }
  for message, (name, format) in refused.items():
    with pytest.raises(UserError, match=message):
      export_model(model(), tmp_path / name, format)
  assert contents(tmp_path) == before


def test_the_current_directory_can_be_exported_to(tmp_path, monkeypatch):
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  export_model(model(), Path(), 'timm')
  assert_same_model(vit_jax.load('.'), model())


def test_an_onnx_model_above_2_gib_stores_its_arrays_in_a_movable_second_file(
  tmp_path, monkeypatch
):
  onnxruntime = pytest.importorskip('onnxruntime')
  monkeypatch.setattr(module, 'MAX_ONNX_BYTES', 0)  # Every model is too large.
  export_model(model(), tmp_path / 'here' / 'model.onnx', 'onnx')
  assert {path.name for path in (tmp_path / 'here').iterdir()} == {'model.onnx', 'model.onnx.data'}
  (tmp_path / 'here').rename(tmp_path / 'there')
  session = onnxruntime.InferenceSession(
    tmp_path / 'there' / 'model.onnx', providers=['CPUExecutionProvider']
  )
  (got,) = session.run(['logits'], {'images': IMAGES})
  np.testing.assert_allclose(got, model().logits(IMAGES), rtol=0, atol=1e-5 * np.abs(got).max())


def test_stablehlo_above_2_gib_raises_before_serializing(tmp_path, monkeypatch):
  pytest.importorskip('flatbuffers')
  monkeypatch.setattr(module, 'MAX_STABLEHLO_BYTES', 0)
  with pytest.raises(UserError, match='2 GiB'):
    export_model(model(), tmp_path / 'model.stablehlo', 'stablehlo')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ('format', 'package'), [('onnx', 'onnx'), ('onnx', 'onnxruntime'), ('stablehlo', 'flatbuffers')]
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, format, package):
  monkeypatch.setattr(
    'importlib.util.find_spec', lambda name: None if name == package else 'installed'
  )
  with pytest.raises(UserError) as error:
    export_model(model(), tmp_path / NAMES[format], format)
  assert str(error.value) == f"--format={format} needs {package}: pip install 'vit-jax[export]'"
  assert list(tmp_path.iterdir()) == []


def test_formats_that_do_not_record_the_sigmoid_loss_say_so(tmp_path):
  ours = dataclasses.replace(model(), loss='sigmoid')
  assert len(export_model(ours, tmp_path / 'model.npz', 'npz')) == 1
  assert vit_jax.load(str(tmp_path / 'model.npz')).loss == 'sigmoid'
  assert 'sigmoid' in export_model(ours, tmp_path / 'timm', 'timm')[1]


def test_the_command_lists_the_formats_and_overrides_of_the_library():
  """The command's copies exist so that --help imports no jax."""
  assert tuple(module.EXPORT_FORMATS) == FORMATS
  assert set(MODEL_FLAGS) <= set(LOAD_OVERRIDES)
