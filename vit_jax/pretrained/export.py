"""A model given back in another format. Whatever is written is read again, and its numbers compared with the model's own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
from safetensors.numpy import save_file

from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.vit import sincos2d
from vit_jax.pretrained.huggingface import to_huggingface
from vit_jax.pretrained.model import Pretrained
from vit_jax.pretrained.npz import to_google
from vit_jax.pretrained.released import load
from vit_jax.pretrained.timm_names import to_timm

LIMIT = 1e-4  # Of the largest difference, relative to the largest number.
IMAGES = 3
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
FLATBUFFER = 2**31 - 2**24  # Bytes: what jax.export can serialise, and room for the program.
PROTOBUF = 2**31 - 2**24  # Bytes: an ONNX file; beyond, its arrays lie in a file beside it.


def export(model: Pretrained, to: Path, format: str) -> list[str]:
  """Writes `model` to the file or directory `to`, as npz, timm, huggingface, onnx or stablehlo; lines that say what came of it.

  UserError, and nothing left behind, where the format cannot hold the model or what was written gives other numbers.
  """
  if format not in FORMATS:
    raise UserError(f'--format={format}.{did_you_mean(format, FORMATS)}')
  write, read = FORMATS[format]
  refuse_other_directory(to, format)
  part = to.with_name(f'{to.name}.{os.getpid()}.part{to.suffix}')
  try:
    to.parent.mkdir(parents=True, exist_ok=True)
    write(model, part)
    difference = compare(model, read(part))
    if not difference <= LIMIT:
      raise UserError(f'{to}: read again, it differs by {difference:.1e} of the largest number, and {LIMIT:.0e} is the most')
    size = sum(file.stat().st_size for file in written(part))
    move(part, to)
  except OSError as error:
    raise UserError(f'can not write {to}: {error.strerror or error}') from None
  finally:
    for left in written(part):
      shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.rmtree(part, ignore_errors=True)
  return [f'{to}: {format}, {size / 2**20:,.1f} MiB; read again, it differs by {difference:.1e} of the largest number']


def written(part: Path) -> list[Path]:
  """The files of a directory, or a file and what lies beside it."""
  if part.is_dir():
    return sorted(part.iterdir())
  return [path for path in (part, part.with_suffix('.json'), part.with_suffix('.data')) if path.exists()]


def move(part: Path, to: Path):
  """To the name that was asked for, a file after those beside it."""
  if part.is_dir():
    shutil.rmtree(to, ignore_errors=True)
    part.replace(to)
    return
  for path in reversed(written(part)):
    path.replace(to if path == part else to.with_suffix(path.suffix))


def refuse_other_directory(to: Path, format: str):
  """UserError where `to` is a directory that is not ours to replace, or a file where a directory is to be."""
  directory = format in ('timm', 'huggingface')
  if to.is_dir() and not directory:
    raise UserError(f'--to={to} is a directory, and {format} is a file')
  if directory and to.is_file():
    raise UserError(f'--to={to} is a file, and {format} is a directory')
  if to.is_dir() and any(to.iterdir()) and not (to / 'model.safetensors').exists():
    raise UserError(f'--to={to} is a directory with other things in it: choose a new one')


def compare(model: Pretrained, again: Callable[[np.ndarray], np.ndarray]) -> float:
  """The largest difference between what the model and `again` say of random images, relative to the largest number."""
  images = np.random.default_rng(0).integers(0, 256, (IMAGES, *model.size, 3), np.uint8)
  ours, theirs = np.asarray(output(model)(images)), np.asarray(again(images))
  if ours.shape != theirs.shape:
    return float('inf')
  return float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-30))


def output(model: Pretrained) -> Callable[[np.ndarray], jax.Array]:
  """Logits, or features where there is no head."""
  return model.logits if model.classes else model.features


def read_ours(to: Path) -> Callable[[np.ndarray], jax.Array]:
  """By `load`, with nothing said besides."""
  return output(load(str(to)))


def write_npz(model: Pretrained, to: Path):
  """Google's layout of 2020, and beside it, in a .json, what its arrays cannot tell."""
  arrays = to_google(flax.traverse_util.flatten_dict(model.params, sep='/'))
  np.savez(to, **arrays)
  how, config = model.preprocessing, model.config
  facts = {'gelu': config.gelu, 'norm_eps': config.norm_eps, 'loss': model.loss, **how}
  facts |= {'position': config.position} if config.position == 'none' else {}
  facts |= {'labels': model.labels} if model.labels else {}
  to.with_suffix('.json').write_text(json.dumps(facts, indent=2, ensure_ascii=False) + '\n')


def write_timm(model: Pretrained, to: Path):
  """A directory that `timm.create_model('local-dir:DIRECTORY', pretrained=True)` takes."""
  arrays, config = to_timm(with_positions(model), model.config, model.preprocessing, model.labels)
  write_directory(to, arrays, {'config.json': config})


def write_huggingface(model: Pretrained, to: Path):
  """A directory that transformers' `from_pretrained` takes."""
  arrays, config, preprocessor = to_huggingface(with_positions(model), model.config, model.preprocessing, model.labels)
  write_directory(to, arrays, {'config.json': config, 'preprocessor_config.json': preprocessor})


def with_positions(model: Pretrained) -> dict[str, np.ndarray]:
  """The flat tree, in which fixed position embeddings are a table as learned ones are: others know no other."""
  flat = flax.traverse_util.flatten_dict(model.params, sep='/')
  if model.config.position == 'learned':
    return flat
  d, (h, w) = model.model.shape.width, model.grid
  fixed = sincos2d((h, w), d) if model.config.position == 'sincos2d' else np.zeros((1, h * w, d), np.float32)
  rows = [np.zeros((1, 1, d), np.float32)] if model.config.pool == 'token' else []
  return flat | {'Transformer/posembed_input/pos_embedding': np.concatenate([*rows, np.asarray(fixed)], axis=1)}


def write_directory(to: Path, arrays: dict[str, np.ndarray], texts: dict[str, dict]):
  """model.safetensors and JSON files."""
  to.mkdir()
  save_file(arrays, to / 'model.safetensors', metadata={'format': 'pt'})
  for name, content in texts.items():
    (to / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n')


def write_stablehlo(model: Pretrained, to: Path):
  """A function of images uint8 [b, h, w, 3], b free, with its parameters inside, for every platform that JAX knows."""
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
  if size > FLATBUFFER:
    raise UserError(f'StableHLO files end at 2 GiB, and the parameters have {size / 2**30:.2f}: export to npz')
  (b,) = jax.export.symbolic_shape('b')
  function = jax.jit(lambda images: model.model.apply({'params': model.params}, images))
  exported = jax.export.export(function, platforms=PLATFORMS)(jax.ShapeDtypeStruct((b, *model.size, 3), np.uint8))
  to.write_bytes(exported.serialize())


def read_stablehlo(to: Path) -> Callable[[np.ndarray], jax.Array]:
  """As anyone would who has JAX and the file."""
  return jax.export.deserialize(bytearray(to.read_bytes())).call


def write_onnx(model: Pretrained, to: Path):
  """With 'images' uint8 [b, h, w, 3] in and 'logits' or 'features' out, b free."""
  try:
    import onnx

    from vit_jax.pretrained.onnx_graph import to_onnx
  except ImportError:
    raise UserError("ONNX needs `pip install '.[export]'`") from None
  large = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) > PROTOBUF
  beside = {'save_as_external_data': True, 'location': to.with_suffix('.data').name} if large else {}
  onnx.save_model(to_onnx(model), to, **beside)


def read_onnx(to: Path) -> Callable[[np.ndarray], np.ndarray]:
  """By onnxruntime, on the CPU."""
  try:
    import onnxruntime
  except ImportError:
    raise UserError("ONNX needs `pip install '.[export]'`") from None
  session = onnxruntime.InferenceSession(to, providers=['CPUExecutionProvider'])
  return lambda images: session.run(None, {'images': images})[0]


FORMATS = {
  'npz': (write_npz, read_ours),
  'timm': (write_timm, read_ours),
  'huggingface': (write_huggingface, read_ours),
  'onnx': (write_onnx, read_onnx),
  'stablehlo': (write_stablehlo, read_stablehlo),
}
