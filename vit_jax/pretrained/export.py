"""Export a model to another format.

Every export is read again, and its outputs are compared with those of the model.
"""

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import flax.traverse_util
import jax
import jax.export
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vit_jax.errors import UserError, check_installed, did_you_mean
from vit_jax.models.families import family_name, with_article
from vit_jax.models.positions import sincos2d_embedding
from vit_jax.pretrained.arrays import POSITION_EMBEDDING
from vit_jax.pretrained.equivalents import to_plain
from vit_jax.pretrained.huggingface_export import to_huggingface
from vit_jax.pretrained.loading import load
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.pretrained.npz import to_bit, to_google
from vit_jax.pretrained.onnx_metadata import onnx_metadata
from vit_jax.pretrained.timm_export import to_timm

# Largest difference of an output, relative to the largest output: in float32, and in float16.
MAX_RELATIVE_ERROR, MAX_FLOAT16_ERROR = 1e-4, 1e-2
# Older runtimes run it: onnxruntime 1.12, TensorRT 8.6, Windows ML. 20 needs onnxruntime 1.17.
DEFAULT_OPSET = 17
COMPARED_IMAGES = 3
STABLEHLO_PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
MAX_STABLEHLO_BYTES = 2**31 - 2**24  # jax.export serializes up to 2 GiB, including the program.
MAX_ONNX_BYTES = 2**31 - 2**24  # Larger ONNX models store their arrays in a separate file.
# Files of a timm or huggingface directory.
EXPORTED_FILES = {'model.safetensors', 'config.json', 'preprocessor_config.json'}


def export_model(
  model: PretrainedModel,
  to: Path,
  format: str,
  *,
  opset: int = DEFAULT_OPSET,
  float16: bool = False,
) -> list[str]:
  """Write a model to the file or directory `to`, and return lines that describe the result.

  Args:
    model: The model.
    to: The path.
    format: npz, timm, huggingface, onnx or stablehlo. StableHLO contains a program in the model's
      dtype. All other formats contain parameters, and are compared in float32.
    opset: Version of the operators of ONNX, 17 or 20.
    float16: Store the weights of ONNX in float16, and compute in it where that is safe.

  Raises UserError, and leaves nothing behind, if the format cannot represent the model or if the
  outputs differ.
  """
  check_format(model, format)
  check_destination(to, format)
  check_exportable(model, format)
  write, read = EXPORT_FORMATS[format]
  if format == 'onnx':
    write = functools.partial(write, opset=opset, float16=float16)
  limit = MAX_FLOAT16_ERROR if float16 else MAX_RELATIVE_ERROR
  destination = to.resolve()
  if format != 'stablehlo':
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype='float32'))
  try:
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f'.{destination.name}.'
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=prefix) as folder:
      written = Path(folder) / destination.name
      write(model, written)
      relative_error = export_relative_error(model, read(written))
      if not relative_error <= limit:  # Also true for NaN.
        raise UserError(
          f'{to}: the relative error after reading it again is {relative_error:.1e}; '
          f'at most {limit:.0e} is allowed'
        )
      size = move_into_place(written, destination)
  except (OSError, SafetensorError) as error:
    raise UserError(f'cannot write {to}: {getattr(error, "strerror", None) or error}') from None
  line = f'{format}, {size / 2**20:,.1f} MiB; relative error after reading it again: '
  return [f'{to}: {line}{relative_error:.1e}', *describe_lost_facts(model, to, format)]


def describe_lost_facts(model: PretrainedModel, to: Path, format: str) -> list[str]:
  """Return lines about what the export does not state, or not as the model has it."""
  lines = describe_lost_steps(model, to) if format in ('timm', 'huggingface') else []
  if format == 'huggingface' and model.config.channels == 1:
    lines.append(f'{to}: transformers does not convert color to grey: give it grey images')
  if format == 'onnx' and model.labels and 'class_names' not in onnx_metadata(model):
    lines.append(f'{to}: the {len(model.labels):,} class names are too long for its metadata')
  if model.loss == 'sigmoid' and format not in ('npz', 'onnx'):
    lines.append(
      f'{to}: the logits are for a sigmoid per class, not a softmax; {format} does not record this'
    )
  return lines


def describe_lost_steps(model: PretrainedModel, to: Path) -> list[str]:
  """Return a line if the exported directory states other steps than the model has."""
  theirs, ours = load(str(to)).preprocessing, model.preprocessing
  differ = [
    f'{name} {getattr(theirs, name)} for {getattr(ours, name)}'
    for name in ('interpolation', 'crop', 'resize_size')
    if getattr(theirs, name) != getattr(ours, name)
  ]
  return [f'{to}: the format has no equal preprocessing: {", ".join(differ)}'] if differ else []


def check_format(model: PretrainedModel, format: str):
  """Raise UserError if the format is unknown, unsupported for the model, or lacks a package."""
  if format not in EXPORT_FORMATS:
    raise UserError(f'--format={format}.{did_you_mean(format, EXPORT_FORMATS)}')
  family = family_name(model.config.variant)
  formats = FORMATS_BY_FAMILY.get(family, EXPORT_FORMATS)
  if format not in formats:
    raise UserError(
      f'--format={format} does not support {with_article(family)}; use {" or ".join(formats)}'
    )
  check_installed(f'--format={format}', 'export', *REQUIRED_PACKAGES.get(format, ()))


def check_exportable(model: PretrainedModel, format: str):
  """Raise UserError if only a program can represent the model's position embeddings."""
  c = model.config
  inside = ('learned2d', 'relative', *(() if format == 'onnx' else ('relative2d',)))
  if format != 'stablehlo' and (c.position in inside or c.position_at != 'stem'):
    other = 'onnx or stablehlo' if c.position == 'relative2d' else 'stablehlo'
    raise UserError(
      f'{format} does not support position embeddings that are {c.position} at {c.position_at}; '
      f'use --format {other}'
    )


def check_destination(to: Path, format: str):
  """Raise UserError if `to` is of the wrong kind, or contains files that are not exports."""
  is_directory_format = format in ('timm', 'huggingface')
  if to.is_dir() and not is_directory_format:
    raise UserError(f'--to={to} is a directory, but {format} is a file')
  if is_directory_format and to.is_file():
    raise UserError(f'--to={to} is a file, but {format} is a directory')
  if to.is_dir() and (others := {path.name for path in to.iterdir()} - EXPORTED_FILES):
    raise UserError(f'--to={to} is a directory that contains {min(others)}: choose a new one')
  if format == 'npz' and to.suffix != '.npz':
    raise UserError(f'--to={to}: expected a name that ends in .npz')
  if format == 'npz' and to.with_suffix('.json').exists() and not to.exists():
    raise UserError(f'--to={to} would replace {to.stem}.json, which exists: choose another name')


def move_into_place(written: Path, destination: Path) -> int:
  """Move the exported files to their destination, and return their size in bytes.

  The file itself moves last, so that the files beside it exist before it does.
  """
  is_directory = written.is_dir()
  source = written if is_directory else written.parent
  target = destination if is_directory else destination.parent
  target.mkdir(exist_ok=True)
  files = sorted(source.iterdir(), key=lambda file: file == written)
  size = sum(file.stat().st_size for file in files)
  umask = os.umask(0)
  os.umask(umask)
  for file in files:
    file.chmod(0o666 & ~umask)  # safetensors and onnx create files that only their owner can read.
    file.replace(target / file.name)
  if is_directory:
    for name in EXPORTED_FILES - {file.name for file in files}:
      (destination / name).unlink(missing_ok=True)  # Left by an export in the other format.
  return size


def export_relative_error(
  model: PretrainedModel, exported: Callable[[np.ndarray], np.ndarray]
) -> float:
  """Return the largest difference between two models' outputs, relative to the largest output.

  The images are random. The comparison runs on the CPU, because accelerators round float32 products
  by more than the limit, and not all alike.
  """
  shape = (COMPARED_IMAGES, *model.size, model.config.channels)
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  with jax.default_device('cpu'):
    expected, actual = np.asarray(forward_function(model)(images)), np.asarray(exported(images))
  if expected.shape != actual.shape:
    return float('inf')
  return float(np.abs(expected - actual).max() / max(np.abs(expected).max(), 1e-30))


def forward_function(model: PretrainedModel) -> Callable[[np.ndarray], jax.Array]:
  """Return a function from images [b, h, w, c] to logits, or to features without a head.

  It runs on JAX's default device.
  """
  apply = jax.jit(lambda params, images: model.model.apply({'params': params}, images))
  return lambda images: apply(model.params, images)


def read_with_load(to: Path) -> Callable[[np.ndarray], jax.Array]:
  """Read an export with `load`, without overrides."""
  return forward_function(load(str(to)))


def write_npz(model: PretrainedModel, to: Path):
  """Write Google's 2020 layout or BiT's.

  A .json file beside it contains the facts that arrays do not determine.
  """
  c = model.config
  lacking = {
    'rotary positions': c.has_rope,
    'class token that is not pooled': c.class_token,
    'RMSNorm': c.norm != 'layernorm',
  }
  if problems := [feature for feature, present in lacking.items() if present]:
    raise UserError(f"Google's layout has no {problems[0]}: use another --format")
  flat = to_plain(flatten_with_positions(model))
  np.savez(to, **(to_google(flat) if 'Transformer' in model.params else to_bit(flat)))
  facts = {
    'gelu': c.gelu,
    'norm_eps': c.norm_eps,
    'loss': model.loss,
    **model.preprocessing.to_dict(),
  }
  if family_name(c.variant) == 'EfficientNet':  # Two variants have the same arrays.
    facts['variant'] = c.variant
  facts |= {'labels': model.labels} if model.labels else {}
  write_json(to.with_suffix('.json'), facts)


def write_timm(model: PretrainedModel, to: Path):
  """Write a directory for `timm.create_model('local-dir:DIRECTORY', pretrained=True)`."""
  flat = flatten_with_positions(model)
  arrays, config = to_timm(flat, model.config, model.preprocessing, model.labels)
  write_safetensors_directory(to, arrays, {'config.json': config})


def write_huggingface(model: PretrainedModel, to: Path):
  """Write a directory for `from_pretrained` of transformers."""
  flat = flatten_with_positions(model)
  arrays, config, preprocessor = to_huggingface(
    flat, model.config, model.preprocessing, model.labels
  )
  configs = {'config.json': config, 'preprocessor_config.json': preprocessor}
  write_safetensors_directory(to, arrays, configs)


def flatten_with_positions(model: PretrainedModel) -> dict[str, np.ndarray]:
  """Return the flat tree, with fixed position embeddings stored like learned ones.

  Other libraries support only learned position embeddings.
  """
  flat = flax.traverse_util.flatten_dict(model.params, sep='/')
  if model.config.has_rope or model.config.position == 'learned':
    return flat
  d, (h, w) = model.model.shape.width, model.grid
  table = np.zeros((1, h * w, d), np.float32)
  if model.config.position == 'sincos2d':
    table = np.asarray(sincos2d_embedding((h, w), d))
  if rows := model.config.prefix_tokens:
    table = np.concatenate([np.zeros((1, rows, d), np.float32), table], axis=1)
  return flat | {POSITION_EMBEDDING: table}


def write_safetensors_directory(to: Path, arrays: dict[str, np.ndarray], configs: dict[str, dict]):
  """Write model.safetensors and JSON files, given by file name."""
  to.mkdir()
  save_file(arrays, to / 'model.safetensors', metadata={'format': 'pt'})
  for name, content in configs.items():
    write_json(to / name, content)


def write_json(path: Path, content: dict):
  """Write an indented JSON file."""
  path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def write_stablehlo(model: PretrainedModel, to: Path):
  """Write a function of images uint8 [b, h, w, c] for every platform, with its parameters inside.

  The batch size b is symbolic. Raises UserError if the parameters exceed 2 GiB.
  """
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
  if size > MAX_STABLEHLO_BYTES:
    raise UserError(
      f'the parameters have {size / 2**30:.2f} GiB, and StableHLO files are limited to 2 GiB: '
      'use --format npz'
    )
  (b,) = jax.export.symbolic_shape('b')
  function = jax.jit(lambda images: model.model.apply({'params': model.params}, images))
  images = jax.ShapeDtypeStruct((b, *model.size, model.config.channels), np.uint8)
  exported = jax.export.export(function, platforms=STABLEHLO_PLATFORMS)(images)
  to.write_bytes(exported.serialize())


def read_stablehlo(to: Path) -> Callable[[np.ndarray], jax.Array]:
  """Return the function in a StableHLO file. It needs only JAX and the file."""
  return jax.export.deserialize(bytearray(to.read_bytes())).call


def write_onnx(
  model: PretrainedModel, to: Path, *, opset: int = DEFAULT_OPSET, float16: bool = False
):
  """Write an ONNX graph from 'images' uint8 [b, h, w, c] to 'logits' or 'features' float32 [b, k].

  The batch size b is free. Above 2 GiB, the arrays are in a second file, NAME.onnx.data.
  """
  import onnx

  from vit_jax.pretrained.onnx_graph import to_onnx

  proto = to_onnx(model, opset=opset, float16=float16)
  large = sum(len(array.raw_data) for array in proto.graph.initializer) > MAX_ONNX_BYTES
  options = {'save_as_external_data': True, 'location': f'{to.name}.data'} if large else {}
  onnx.save_model(proto, to, format='protobuf', **options)
  onnx.checker.check_model(str(to))  # By its path, since it may have a second file.


def read_onnx(to: Path) -> Callable[[np.ndarray], np.ndarray]:
  """Return a function that runs an ONNX graph with onnxruntime on the CPU."""
  import onnxruntime

  session = onnxruntime.InferenceSession(to, providers=['CPUExecutionProvider'])
  return lambda images: session.run(None, {'images': images})[0]


EXPORT_FORMATS = {  # Format -> (write, read).
  'npz': (write_npz, read_with_load),
  'timm': (write_timm, read_with_load),
  'huggingface': (write_huggingface, read_with_load),
  'onnx': (write_onnx, read_onnx),
  'stablehlo': (write_stablehlo, read_stablehlo),
}
# Packages of the extra 'export'.
REQUIRED_PACKAGES = {'onnx': ('onnx', 'onnxruntime'), 'stablehlo': ('flatbuffers',)}
# Families that other libraries do not support completely, or whose arrays do not determine the
# model.
FORMATS_BY_FAMILY = {
  'BiT ResNet': ('npz', 'stablehlo'),
  'EfficientNet': ('npz', 'stablehlo'),
  'Axial-ViT': ('stablehlo',),
  'Axial ResNet': ('stablehlo',),
}
