"""ONNX files: their operators, types and metadata, run by onnxruntime at both opsets."""

import dataclasses
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.pretrained.families import redrawn, run
from tests.pretrained.test_export import IMAGES, MODELS, model
from vit_jax.cli.export import OPSETS
from vit_jax.errors import UserError
from vit_jax.pretrained import onnx_metadata as metadata_module
from vit_jax.pretrained.export import export_model
from vit_jax.pretrained.model import PretrainedModel

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
graph_module = pytest.importorskip('vit_jax.pretrained.onnx_graph')

SHARED = Path(__file__).parents[3] / 'shared' / 'data'
# Largest difference from our float32 outputs, relative to the largest output.
BOUNDS = {'float32': 1e-4, 'float16': 1e-2}
FORMS = [(opset, dtype) for opset in OPSETS for dtype in BOUNDS]
KINDS = ('class token', 'erf', 'mean', 'MAP', 'hidden layer', 'registers', 'patch norm', 'hybrid')


def exported(ours: PretrainedModel, to: Path, opset: int, dtype: str = 'float32'):
  """Export a model, and return (the checked file, a function of images)."""
  export_model(ours, to, 'onnx', opset=opset, float16=dtype == 'float16')
  proto = onnx.load(to)
  onnx.checker.check_model(proto, full_check=True)
  session = onnxruntime.InferenceSession(to, providers=['CPUExecutionProvider'])
  return proto, lambda images: session.run(None, {'images': images})[0]


def metadata_of(proto) -> dict[str, str]:
  return {entry.key: entry.value for entry in proto.metadata_props}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('opset', 'dtype'), FORMS)
def test_onnxruntime_computes_our_logits_at_each_opset_and_type(tmp_path, opset, dtype, kind):
  ours = model(**MODELS[kind])
  proto, outputs = exported(ours, tmp_path / 'model.onnx', opset, dtype)
  assert [each.version for each in proto.opset_import] == [opset]
  assert ('Gelu' in {node.op_type for node in proto.graph.node}) == (opset == 20)
  expected = np.asarray(ours.logits(IMAGES))
  got = outputs(IMAGES)
  assert got.dtype == np.float32
  assert np.abs(got - expected).max() <= BOUNDS[dtype] * np.abs(expected).max()


def test_float16_has_weights_of_two_bytes_and_norms_and_softmax_in_float32(tmp_path):
  ours = model(depth=3)
  proto, _ = exported(ours, tmp_path / 'model.onnx', 17, 'float16')
  half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
  arrays = {array.name: array for array in proto.graph.initializer}
  assert {arrays[name].data_type for name in arrays if arrays[name].dims and
          math.prod(arrays[name].dims) >= 1000} == {half}  # fmt: skip
  inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
  types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
  kinds = {node.output[0]: node.op_type for node in proto.graph.node}
  for kind, expected in (('Softmax', single), ('LayerNormalization', single)):
    assert {types[name] for name in kinds if kinds[name] == kind} == {expected}
  products = [types[name] for name in kinds if kinds[name] == 'MatMul']
  # Patches, and 6 products and 2 of attention in each block; the head's is float32.
  assert products.count(half) == 1 + 3 * 8 and products.count(single) == 1


@pytest.mark.parametrize('kind', ['tanh', 'erf'])
@pytest.mark.parametrize('opset', OPSETS)
def test_gelu_in_float16_is_finite_for_every_input(opset, kind):
  g = graph_module.OnnxGraph(opset, float16=True)
  y = g.as_single(graph_module.add_gelu(g, g.as_half('x'), kind))
  value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ['n'])
  graph = onnx.helper.make_graph(g.nodes, 'gelu', [value('x')], [value(y)], g.constants)
  proto = onnx.helper.make_model(
    graph, opset_imports=[onnx.helper.make_opsetid('', opset)], ir_version=9
  )
  session = onnxruntime.InferenceSession(proto.SerializeToString())
  x = np.float32([-60_000, -300, -41, -3, -0.5, 0, 0.5, 3, 41, 300, 60_000])
  (got,) = session.run(None, {'x': x})
  expected = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()])
  np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def test_a_weight_that_float16_cannot_represent_is_an_error(tmp_path):
  ours = model()
  kernel = ours.params['head']['kernel'].copy()
  kernel[0, 0] = 1e5
  params = ours.params | {'head': ours.params['head'] | {'kernel': kernel}}
  large = dataclasses.replace(ours, params=params)
  with pytest.raises(UserError, match=r'float16 cannot represent a weight of 1e\+05'):
    export_model(large, tmp_path / 'model.onnx', 'onnx', float16=True)
  assert list(tmp_path.iterdir()) == []


def test_a_dinov2_of_timm_with_registers_and_layer_scale_has_timms_features(tmp_path, timm):
  from safetensors.torch import save_file

  name, arguments = 'vit_small_patch14_reg4_dinov2', {'img_size': 28, 'depth': 3}
  theirs = redrawn(timm.create_model(name, num_classes=0, **arguments))
  (tmp_path / 'dino').mkdir()
  save_file(theirs.state_dict(), tmp_path / 'dino' / 'model.safetensors')
  config = {
    'architecture': name,
    'num_classes': 0,
    'model_args': arguments,
    'pretrained_cfg': {'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225]},
  }
  (tmp_path / 'dino' / 'config.json').write_text(json.dumps(config), encoding='utf-8')
  ours = vit_jax.load(str(tmp_path / 'dino'))
  assert ours.config.registers == 4 and ours.config.gelu == 'erf'
  images = IMAGES[:, :28, :28]
  expected = run(theirs, images, mean=(123.675, 116.28, 103.53), scale=(58.395, 57.12, 57.375))
  for opset, dtype in FORMS:
    _, outputs = exported(ours, tmp_path / f'{opset}{dtype}.onnx', opset, dtype)
    difference = np.abs(outputs(images) - expected).max() / np.abs(expected).max()
    assert difference <= BOUNDS[dtype], (opset, dtype)


def test_the_metadata_state_class_names_preprocessing_and_activation(tmp_path):
  ours = dataclasses.replace(model(), loss='sigmoid')
  (line,) = export_model(ours, tmp_path / 'model.onnx', 'onnx')
  assert 'sigmoid' not in line  # The file states it.
  session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
  metadata = session.get_modelmeta().custom_metadata_map
  assert json.loads(metadata['class_names']) == ['é0', 'é1', 'é2', 'é3', 'é4']
  assert metadata['activation'] == 'sigmoid'
  assert json.loads(metadata['size']) == [32, 32]
  np.testing.assert_allclose(json.loads(metadata['mean']), [0.485, 0.456, 0.406])
  np.testing.assert_allclose(json.loads(metadata['std']), [0.229, 0.224, 0.225])
  assert json.loads(metadata['preprocessing'])['resize_size'] == [40, 40]
  assert json.loads(metadata['preprocessing_steps']) == [
    'Decode to 8-bit RGB.',
    'Turn upright by the EXIF orientation.',
    "Scale to cover 40x40 (height x width): Pillow's bicubic, antialiased.",
    'Crop 32x32 at the center.',
  ]
  headless = model(classes=0)
  proto, _ = exported(headless, tmp_path / 'features.onnx', 17)
  assert not metadata_of(proto).keys() & {'class_names', 'activation'}


def test_the_metadata_of_21843_classes_are_below_a_mebibyte(tmp_path, monkeypatch):
  ours = model(classes=21_843)
  ours = dataclasses.replace(ours, labels=vit_jax.data.imagenet.imagenet_class_names('imagenet21k'))
  proto, _ = exported(ours, tmp_path / 'model.onnx', 17)
  metadata = metadata_of(proto)
  assert len(json.loads(metadata['class_names'])) == 21_843
  assert sum(map(len, metadata.values())) < 2**20
  monkeypatch.setattr(metadata_module, 'MAX_CLASS_NAMES_BYTES', 600_000)
  _, line = export_model(ours, tmp_path / 'model.onnx', 'onnx')
  assert 'the 21,843 class names are too long' in line
  assert 'class_names' not in metadata_of(onnx.load(tmp_path / 'model.onnx'))


def photos(folder: str, each: int) -> tuple[list[bytes], np.ndarray]:
  """Return `each` photos of each of the five classes in `folder`, and the index of their class."""
  with tarfile.open(SHARED / 'flower_photos_1000.tar') as archive:
    members = sorted((m for m in archive if m.name.endswith('.jpg')), key=lambda m: m.name)
    names = sorted({Path(m.name).parent.name for m in members})
    chosen = []
    for k, name in enumerate(names):
      own = [m for m in members if m.name.endswith(f'{folder}/{name}/{Path(m.name).name}')]
      chosen += [(archive.extractfile(m).read(), k) for m in own[:each]]
  return [data for data, _ in chosen], np.array([k for _, k in chosen])


def preprocess_by_metadata(data: bytes, metadata: dict[str, str]) -> np.ndarray:
  """Follow the metadata with Pillow alone: the model's steps are a center crop with bicubic."""
  image, (h, w) = Image.open(io.BytesIO(data)).convert('RGB'), json.loads(metadata['size'])
  (short, _), crop = (json.loads(metadata['preprocessing'])[n] for n in ('resize_size', 'crop'))
  assert crop == 'center' and "Pillow's bicubic" in metadata['preprocessing_steps']
  factor = short / min(image.size)
  size = [short if n == min(image.size) else int(n * factor) for n in image.size]
  image = image.resize(size, Image.Resampling.BICUBIC)
  x, y = ((n - m) // 2 for n, m in zip(image.size, (w, h), strict=True))
  return np.asarray(image.crop((x, y, x + w, y + h)))


@pytest.mark.skipif(not SHARED.is_dir(), reason='needs shared data')
def test_a_real_model_predicts_the_same_classes_of_real_photos(tmp_path):
  """The head is a ridge regression. Images are made from the metadata alone."""
  backbone = vit_jax.load(
    str(SHARED / 'vit_s14_google_keys_f16.npz'), gelu='erf', mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225), crop='center', short_side=256, interpolation='pil_bicubic',
  )  # fmt: skip
  proto, features = exported(backbone, tmp_path / 'backbone.onnx', 17)
  prepare = lambda files: np.stack([preprocess_by_metadata(f, metadata_of(proto)) for f in files])
  train, train_labels = photos('train', 10)
  x = features(prepare(train)).astype(np.float64)
  centered = x - x.mean(axis=0)
  gram = centered @ centered.T + np.trace(centered @ centered.T) / 10 / len(x) * np.eye(len(x))
  kernel = centered.T @ np.linalg.solve(gram, np.eye(5)[train_labels] - 0.2)
  head = {'kernel': np.float32(kernel), 'bias': np.float32(-x.mean(axis=0) @ kernel)}
  ours = dataclasses.replace(
    backbone, params=backbone.params | {'head': head}, classes=5, labels=tuple('abcde')
  )
  val, labels = photos('val', 6)
  images = prepare(val)
  expected = np.asarray(ours.logits(images))
  accuracy = (expected.argmax(axis=1) == labels).mean()
  assert accuracy > 0.4  # Chance is 0.2.
  for opset, dtype in ((17, 'float32'), (17, 'float16'), (20, 'float16')):
    _, logits = exported(ours, tmp_path / 'model.onnx', opset, dtype)
    got = logits(images)
    difference = np.abs(got - expected).max() / np.abs(expected).max()
    print(f'{opset} {dtype}: {difference:.1e}, accuracy {accuracy}')
    assert difference <= BOUNDS[dtype]
    np.testing.assert_array_equal(got.argmax(axis=1), expected.argmax(axis=1))
