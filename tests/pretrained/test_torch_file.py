"""PyTorch checkpoints, and files that are no weights."""

import argparse
import importlib.util
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

import vit_jax
from vit_jax.errors import UserError
from vit_jax.pretrained.arrays import open_arrays
from vit_jax.pretrained.weight_files import LEGACY_TORCH_MAGIC

STATE_KEYS = ('model', 'state_dict', 'model_state', 'teacher', 'ema')


@pytest.fixture
def torch():
  return pytest.importorskip('torch')


def draw_state(torch) -> dict:
  """Return a small ViT in timm's names: width 8, two blocks, patches of 4, images of 8."""
  generator = torch.Generator().manual_seed(0)
  shapes = {
    'cls_token': (1, 1, 8), 'pos_embed': (1, 5, 8), 'patch_embed.proj.weight': (8, 3, 4, 4),
    'patch_embed.proj.bias': (8,), 'norm.weight': (8,), 'norm.bias': (8,),
    'head.weight': (3, 8), 'head.bias': (3,),
  }  # fmt: skip
  for i in range(2):
    shapes |= {
      f'blocks.{i}.{name}': shape
      for name, shape in {
        'norm1.weight': (8,), 'norm1.bias': (8,), 'norm2.weight': (8,), 'norm2.bias': (8,),
        'attn.qkv.weight': (24, 8), 'attn.qkv.bias': (24,), 'attn.proj.weight': (8, 8),
        'attn.proj.bias': (8,), 'mlp.fc1.weight': (32, 8), 'mlp.fc1.bias': (32,),
        'mlp.fc2.weight': (8, 32), 'mlp.fc2.bias': (8,),
      }.items()
    }  # fmt: skip
  return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_holds(path: Path, state: dict, atol: float = 0):
  arrays = open_arrays(path)
  assert set(arrays) == set(state)
  for name, tensor in state.items():
    np.testing.assert_allclose(arrays[name], tensor.float().numpy(), rtol=0, atol=atol)


@pytest.mark.parametrize('zip_format', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('name', ['model.pth', 'model.pt', 'pytorch_model.bin', 'no_suffix'])
def test_tensors_are_read_from_both_formats_of_pytorch(torch, tmp_path, name, zip_format):
  state = draw_state(torch)
  torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zip_format)
  assert_holds(tmp_path / name, state)


def test_the_legacy_magic_is_that_of_pytorch(torch, tmp_path):
  torch.save({}, tmp_path / 'x', _use_new_zipfile_serialization=False)
  assert (tmp_path / 'x').read_bytes().startswith(LEGACY_TORCH_MAGIC)


def test_half_precision_becomes_float32(torch, tmp_path):
  for dtype in (torch.float16, torch.bfloat16):
    state = {name: tensor.to(dtype) for name, tensor in draw_state(torch).items()}
    torch.save(state, tmp_path / 'x.pt')
    assert_holds(tmp_path / 'x.pt', state)


def test_a_transposed_view_and_a_shared_storage_have_their_own_values(torch, tmp_path):
  storage = torch.arange(12.0)
  state = {'a': storage.view(3, 4).T, 'b': storage[3:5]}
  torch.save(state, tmp_path / 'x.pt')
  assert_holds(tmp_path / 'x.pt', state)


@pytest.mark.parametrize('keys', [*((key,) for key in STATE_KEYS), ('model', 'state_dict')])
def test_nested_weights_are_found_and_noted(torch, tmp_path, keys):
  state = content = draw_state(torch)
  for key in reversed(keys):
    content = {'epoch': 3, 'optimizer': {'state': {}}, key: content}
  torch.save(content, tmp_path / 'x.pth')
  assert_holds(tmp_path / 'x.pth', state)
  notes = open_arrays(tmp_path / 'x.pth').notes
  assert [key for key in keys if any(repr(key) in note for note in notes)] == list(keys)


def test_of_several_the_first_in_the_order_is_read_and_the_others_are_named(torch, tmp_path):
  state = draw_state(torch)
  other = {name: tensor + 1 for name, tensor in state.items()}
  torch.save({'ema': other, 'model': state}, tmp_path / 'x.pth')
  assert_holds(tmp_path / 'x.pth', state)
  (note,) = open_arrays(tmp_path / 'x.pth').notes
  assert "'model'" in note and "'ema' ignored" in note


@pytest.mark.parametrize(
  'prefix', ['module.', '_orig_mod.', 'model.', 'backbone.', 'module._orig_mod.']
)
def test_a_prefix_of_all_names_is_removed_and_noted(torch, tmp_path, prefix):
  state = draw_state(torch)
  torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / 'x.pth')
  assert_holds(tmp_path / 'x.pth', state)
  assert open_arrays(tmp_path / 'x.pth').notes == (
    f'the prefix {prefix!r} of all names is ignored',
  )


def test_a_prefix_of_only_some_names_stays(torch, tmp_path):
  state = {'backbone.a': torch.ones(2), 'head.b': torch.ones(3)}
  torch.save(state, tmp_path / 'x.pth')
  assert_holds(tmp_path / 'x.pth', state)


def test_a_loaded_checkpoint_has_the_function_of_its_safetensors_copy(torch, tmp_path):
  safetensors = pytest.importorskip('safetensors.torch')
  state = draw_state(torch)
  torch.save(
    {'model': {f'module.{name}': each for name, each in state.items()}}, tmp_path / 'a.pth'
  )
  safetensors.save_file(state, tmp_path / 'b.safetensors')
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
  ours, theirs = (
    vit_jax.load(str(tmp_path / name), heads=2) for name in ('a.pth', 'b.safetensors')
  )
  np.testing.assert_array_equal(ours.logits(images), theirs.logits(images))
  assert any("under 'model'" in note for note in ours.notes)
  assert any("prefix 'module.'" in note for note in ours.notes)


class Attack:
  """An object that creates a file when it is unpickled."""

  def __init__(self, path: Path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('zip_format', [True, False], ids=['zip', 'legacy'])
def test_a_checkpoint_with_other_objects_runs_no_code_and_says_how_to_convert_it(
  torch, tmp_path, zip_format
):
  attack = Attack(tmp_path / 'attacked')
  for content in ({'model': attack}, {'args': argparse.Namespace(lr=1), 'model': {}}):
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zip_format)
    with pytest.raises(UserError, match='weights_only=False') as error:
      open_arrays(tmp_path / 'x.pth')
    assert '\n' not in str(error.value)
  assert not (tmp_path / 'attacked').exists()


@pytest.mark.parametrize('content', [{}, {'model': {}}, [1, 2], {'epoch': 3}])
def test_a_checkpoint_without_tensors_is_an_error(torch, tmp_path, content):
  torch.save(content, tmp_path / 'x.pth')
  with pytest.raises(UserError, match='no tensors by name'):
    open_arrays(tmp_path / 'x.pth')


def test_a_truncated_checkpoint_is_a_one_line_error(torch, tmp_path):
  for zip_format in (True, False):
    torch.save(draw_state(torch), tmp_path / 'x', _use_new_zipfile_serialization=zip_format)
    (tmp_path / 'x').write_bytes((tmp_path / 'x').read_bytes()[:900])
    with pytest.raises(UserError) as error:
      open_arrays(tmp_path / 'x')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (b'\x89HDF\r\n\x1a\n' + bytes(100), 'HDF5'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n', 'git lfs pull'),
    (b'<!DOCTYPE html><html>Sign in</html>', 'web page'),
    (b'\xef\xbb\xbf\n  <HTML>', 'web page'),
    (b'\x1f\x8b\x08' + bytes(100), 'gzip'),
    (b'\x80\x04\x95' + bytes(100), 'pickle'),
    (b'', 'is empty'),
  ],
)
@pytest.mark.parametrize('name', ['x.npz', 'model.safetensors', 'pytorch_model.bin'])
def test_a_file_that_is_no_weights_is_recognized_by_its_first_bytes(tmp_path, content, words, name):
  (tmp_path / name).write_bytes(content)
  for path in (tmp_path / name, tmp_path):
    with pytest.raises(UserError, match=words) as error:
      vit_jax.load(str(path))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('legacy', [False, True])
def test_without_pytorch_one_line_says_what_to_install(tmp_path, monkeypatch, legacy):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name: None if name == 'torch' else find_spec(name)
  )
  if legacy:
    (tmp_path / 'x.pth').write_bytes(LEGACY_TORCH_MAGIC)
  else:
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w') as file:
      file.writestr('x/data.pkl', b'')
  with pytest.raises(UserError, match=r"pip install 'vit-jax\[torch\]'"):
    open_arrays(tmp_path / 'x.pth')


@pytest.mark.parametrize('first', [b'\x80', b'\x1f\x8b'], ids=['pickle', 'gzip'])
def test_safetensors_may_start_with_the_bytes_of_another_kind(tmp_path, first):
  """A safetensors file starts with the length of its header."""
  data = np.arange(3, dtype='<f4').tobytes()
  header = b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
  length = int.from_bytes(first.ljust(2, b'\1'), 'little')
  (tmp_path / 'x.safetensors').write_bytes(
    length.to_bytes(8, 'little') + header.ljust(length) + data
  )
  assert open_arrays(tmp_path / 'x.safetensors')['x'].tolist() == [0, 1, 2]


def test_full_precision_is_preferred_to_half(tmp_path):
  safetensors = pytest.importorskip('safetensors.numpy')
  for name, value in (('model.fp16.safetensors', 1), ('model.safetensors', 2)):
    safetensors.save_file({'x': np.full(3, value, np.float32)}, tmp_path / name)
  assert open_arrays(tmp_path)['x'].tolist() == [2, 2, 2]


def test_a_pipe_or_device_is_not_read(tmp_path):
  os.mkfifo(tmp_path / 'x.npz')
  (tmp_path / 'zero.npz').symlink_to('/dev/zero')
  for name in ('x.npz', 'zero.npz'):
    with pytest.raises(UserError, match='not a regular file'):
      vit_jax.load(str(tmp_path / name))
