"""A model given back in another format. Whatever is written is read again, and its numbers compared with the model's own."""

import dataclasses
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
from vit_jax.models.layers import sincos2d_embedding
from vit_jax.pretrained.huggingface import to_huggingface
from vit_jax.pretrained.loading import load
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.pretrained.npz import to_bit, to_google
from vit_jax.pretrained.timm_vit import to_timm

MAX_RELATIVE_ERROR = 1e-4  # Of the largest difference, relative to the largest number.
COMPARED_IMAGES = 3
STABLEHLO_PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
MAX_STABLEHLO_BYTES = (
  2**31 - 2**24
)  # Bytes: what jax.export can serialise, and room for the program.
MAX_ONNX_BYTES = 2**31 - 2**24  # Bytes: an ONNX file; beyond, its arrays lie in a file beside it.
EXPORTED_FILES = {
  'model.safetensors',
  'config.json',
  'preprocessor_config.json',
}  # What those of timm and huggingface hold.


def export_model(model: PretrainedModel, to: Path, format: str) -> list[str]:
  """Writes `model` to the file or directory `to`, as npz, timm, huggingface, onnx or stablehlo; lines that say what came of it.

  Only StableHLO holds a program, of the model's dtype; all others are parameters, compared in float32. UserError, and
  nothing left behind, where the format cannot hold the model or what was written gives other numbers.
  """
  if format not in EXPORT_FORMATS:
    raise UserError(f'--format={format}.{did_you_mean(format, EXPORT_FORMATS)}')
  kind = family_name(model.config.variant)
  if format not in (formats := FORMATS_BY_FAMILY.get(kind, EXPORT_FORMATS)):
    raise UserError(
      f'--format={format}: {with_article(kind)} goes to {" and to ".join(formats)} only'
    )
  write, read = EXPORT_FORMATS[format]
  check_installed(f'--format={format}', 'export', *REQUIRED_PACKAGES.get(format, ()))
  check_destination(to, format)
  check_exportable(model, format)
  place = to.resolve()
  if format != 'stablehlo':
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype='float32'))
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f'.{place.name}.') as folder:
      made = Path(folder) / place.name
      write(model, made)
      difference = export_relative_error(model, read(made))
      if not difference <= MAX_RELATIVE_ERROR:
        raise UserError(
          f'{to}: read again, it differs by {difference:.1e} of the largest number, and {MAX_RELATIVE_ERROR:.0e} is the most'
        )
      size = move_into_place(made, place)
  except (OSError, SafetensorError) as error:
    raise UserError(f'can not write {to}: {getattr(error, "strerror", None) or error}') from None
  lines = [
    f'{to}: {format}, {size / 2**20:,.1f} MiB; read again, it differs by {difference:.1e} of the largest number'
  ]
  if model.loss == 'sigmoid' and format != 'npz':
    lines.append(
      f'{to}: its logits are of a sigmoid for each class, not of a softmax, which {format} does not tell'
    )
  return lines


def check_exportable(model: PretrainedModel, format: str):
  """UserError where only a program could say how the model uses its arrays."""
  c = model.config
  if format != 'stablehlo' and (c.position in ('learned2d', 'relative') or c.position_at != 'stem'):
    raise UserError(
      f'{format} knows no position embeddings that are {c.position} at {c.position_at}; --format stablehlo does'
    )


def check_destination(to: Path, format: str):
  """UserError where `to` is not what the format is, or holds what is not ours to replace."""
  directory = format in ('timm', 'huggingface')
  if to.is_dir() and not directory:
    raise UserError(f'--to={to} is a directory, and {format} is a file')
  if directory and to.is_file():
    raise UserError(f'--to={to} is a file, and {format} is a directory')
  if to.is_dir() and (others := {path.name for path in to.iterdir()} - EXPORTED_FILES):
    raise UserError(f'--to={to} is a directory that holds {min(others)}: choose a new one')
  if format == 'npz' and to.suffix != '.npz':
    raise UserError(f'--to={to}: expected a name that ends in .npz')
  if format == 'npz' and to.with_suffix('.json').exists() and not to.exists():
    raise UserError(
      f'--to={to}: {to.stem}.json would be written beside it, and lies there already: choose another name'
    )


def move_into_place(made: Path, place: Path) -> int:
  """To where it was asked for, files beside a file before it; the bytes that they have."""
  source, target = (made, place) if made.is_dir() else (made.parent, place.parent)
  target.mkdir(exist_ok=True)
  files = sorted(source.iterdir(), key=lambda file: file == made)
  size = sum(file.stat().st_size for file in files)
  umask = os.umask(0)
  os.umask(umask)
  for file in files:
    file.chmod(0o666 & ~umask)  # safetensors and onnx make files that nobody but their owner reads.
    file.replace(target / file.name)
  for name in EXPORTED_FILES - {file.name for file in files} if target == place else ():
    (place / name).unlink(missing_ok=True)  # Of another format.
  return size


def export_relative_error(
  model: PretrainedModel, again: Callable[[np.ndarray], np.ndarray]
) -> float:
  """The largest difference between what the model and `again` say of random images, relative to the largest number.

  On the CPU: accelerators round the products of float32 by more than the limit, and not all alike.
  """
  images = np.random.default_rng(0).integers(0, 256, (COMPARED_IMAGES, *model.size, 3), np.uint8)
  with jax.default_device('cpu'):
    ours, theirs = np.asarray(forward_function(model)(images)), np.asarray(again(images))
  if ours.shape != theirs.shape:
    return float('inf')
  return float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-30))


def forward_function(model: PretrainedModel) -> Callable[[np.ndarray], jax.Array]:
  """Images [b, h, w, 3] -> logits, or features where there is no head, wherever JAX computes by default."""
  apply = jax.jit(lambda params, images: model.model.apply({'params': params}, images))
  return lambda images: apply(model.params, images)


def read_with_load(to: Path) -> Callable[[np.ndarray], jax.Array]:
  """By `load`, with nothing said besides."""
  return forward_function(load(str(to)))


def write_npz(model: PretrainedModel, to: Path):
  """Google's layout, of 2020 or of BiT, and beside it, in a .json, what its arrays cannot tell."""
  flat = flatten_with_positions(model)
  np.savez(to, **(to_google(flat) if 'Transformer' in model.params else to_bit(flat)))
  facts = {
    'gelu': model.config.gelu,
    'norm_eps': model.config.norm_eps,
    'loss': model.loss,
    **model.preprocessing,
  }
  facts |= {'labels': model.labels} if model.labels else {}
  to.with_suffix('.json').write_text(json.dumps(facts, indent=2, ensure_ascii=False) + '\n')


def write_timm(model: PretrainedModel, to: Path):
  """A directory that `timm.create_model('local-dir:DIRECTORY', pretrained=True)` takes."""
  arrays, config = to_timm(
    flatten_with_positions(model), model.config, model.preprocessing, model.labels
  )
  write_safetensors_directory(to, arrays, {'config.json': config})


def write_huggingface(model: PretrainedModel, to: Path):
  """A directory that transformers' `from_pretrained` takes."""
  arrays, config, preprocessor = to_huggingface(
    flatten_with_positions(model), model.config, model.preprocessing, model.labels
  )
  write_safetensors_directory(
    to, arrays, {'config.json': config, 'preprocessor_config.json': preprocessor}
  )


def flatten_with_positions(model: PretrainedModel) -> dict[str, np.ndarray]:
  """The flat tree, in which fixed position embeddings are a table as learned ones are: others know no other."""
  flat = flax.traverse_util.flatten_dict(model.params, sep='/')
  if model.config.position == 'learned':
    return flat
  d, (h, w) = model.model.shape.width, model.grid
  fixed = (
    sincos2d_embedding((h, w), d)
    if model.config.position == 'sincos2d'
    else np.zeros((1, h * w, d), np.float32)
  )
  rows = [np.zeros((1, 1, d), np.float32)] if model.config.pool == 'token' else []
  return flat | {
    'Transformer/posembed_input/pos_embedding': np.concatenate([*rows, np.asarray(fixed)], axis=1)
  }


def write_safetensors_directory(to: Path, arrays: dict[str, np.ndarray], texts: dict[str, dict]):
  """model.safetensors and JSON files."""
  to.mkdir()
  save_file(arrays, to / 'model.safetensors', metadata={'format': 'pt'})
  for name, content in texts.items():
    (to / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n')


def write_stablehlo(model: PretrainedModel, to: Path):
  """A function of images uint8 [b, h, w, 3], b free, with its parameters inside, for every platform that JAX knows."""
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
  if size > MAX_STABLEHLO_BYTES:
    raise UserError(
      f'StableHLO files end at 2 GiB, and the parameters have {size / 2**30:.2f}: export to npz'
    )
  (b,) = jax.export.symbolic_shape('b')
  function = jax.jit(lambda images: model.model.apply({'params': model.params}, images))
  exported = jax.export.export(function, platforms=STABLEHLO_PLATFORMS)(
    jax.ShapeDtypeStruct((b, *model.size, 3), np.uint8)
  )
  to.write_bytes(exported.serialize())


def read_stablehlo(to: Path) -> Callable[[np.ndarray], jax.Array]:
  """As anyone would who has JAX and the file."""
  return jax.export.deserialize(bytearray(to.read_bytes())).call


def write_onnx(model: PretrainedModel, to: Path):
  """With 'images' uint8 [b, h, w, 3] in and 'logits' or 'features' out, b free."""
  import onnx

  from vit_jax.pretrained.onnx_graph import to_onnx

  large = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) > MAX_ONNX_BYTES
  beside = {'save_as_external_data': True, 'location': f'{to.name}.data'} if large else {}
  onnx.save_model(to_onnx(model), to, format='protobuf', **beside)


def read_onnx(to: Path) -> Callable[[np.ndarray], np.ndarray]:
  """By onnxruntime, on the CPU."""
  import onnxruntime

  session = onnxruntime.InferenceSession(to, providers=['CPUExecutionProvider'])
  return lambda images: session.run(None, {'images': images})[0]


EXPORT_FORMATS = {
  'npz': (write_npz, read_with_load),
  'timm': (write_timm, read_with_load),
  'huggingface': (write_huggingface, read_with_load),
  'onnx': (write_onnx, read_onnx),
  'stablehlo': (write_stablehlo, read_stablehlo),
}
REQUIRED_PACKAGES = {
  'onnx': ('onnx', 'onnxruntime'),
  'stablehlo': ('flatbuffers',),
}  # Packages of the extra `export_model`.
# Of families whose models nobody else knows all of, or whose arrays do not tell what they are of.
FORMATS_BY_FAMILY = {
  'BiT ResNet': ('npz', 'stablehlo'),
  'EfficientNet': ('npz', 'stablehlo'),
  'Axial-ViT': ('stablehlo',),
  'Axial ResNet': ('stablehlo',),
}
