"""Families of checkpoints that `load` reads, each with an independent reference implementation.

The table of docs/guides/checkpoints.md has the differences that were measured last:

    python -m pytest -s -m '' tests/pretrained/test_parity.py | python -m tests.pretrained.families
"""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

import vit_jax
from tests.pretrained.released_layout import draw, google_file
from tests.pretrained.vit5_reference import vit5_arrays, vit5_logits
from vit_jax.config import ModelConfig
from vit_jax.pretrained.npz import to_google

TINY = {'width': 48, 'depth': 3, 'mlp': 96, 'heads': 3}
SIZE = (64, 64)
FIGURES = Path(__file__).with_name('parity_figures.json')


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of checkpoints.

  `compare(tmp_path, images, library)` returns our outputs and those of timm or transformers.
  """

  name: str
  files: str
  against: str
  compare: Callable
  size: tuple[int, int] = SIZE
  slow: bool = False


def normalised(images: np.ndarray, mean: float | tuple = 127.5, scale: float | tuple = 127.5):
  """Convert uint8 [b, h, w, 3] to a normalized PyTorch tensor [b, 3, h, w]."""
  import torch

  x = (images.astype(np.float32) - np.asarray(mean, np.float32)) / np.asarray(scale, np.float32)
  return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def run(model, images: np.ndarray, **statistics) -> np.ndarray:
  """Return the logits, or the features, of a timm model."""
  import torch

  with torch.no_grad():
    return model.eval()(normalised(images, **statistics)).numpy()


def timm_model(timm, config: ModelConfig, classes: int, size: tuple[int, int], **kwargs):
  """Return timm's Vision Transformer of the same shape.

  It has the tanh form of GELU, with which the released files were trained.
  """
  from vit_jax.models.vit import build_vit

  s = build_vit(config, classes).shape
  return timm.create_model(
    'vit_base_patch16_224',
    **{
      'img_size': size, 'patch_size': s.patch[0], 'embed_dim': s.width, 'depth': s.depth,
      'num_heads': s.heads, 'mlp_ratio': s.mlp / s.width, 'num_classes': classes,
      'act_layer': 'gelu_tanh', **kwargs,
    },
  )  # fmt: skip


def google(variant: str, *, size: tuple[int, int] = SIZE, classes: int = 10, **fields):
  """Compare an .npz file in the released layout, read by timm and by `load`."""

  def compare(tmp_path: Path, images: np.ndarray, timm):
    config = ModelConfig(variant=variant, **fields)
    google_file(tmp_path / 'file.npz', config, classes=classes, size=size)
    theirs = timm_model(timm, config, classes, size)
    theirs.load_pretrained(str(tmp_path / 'file.npz'))
    return vit_jax.load(str(tmp_path / 'file.npz')).logits(images), run(theirs, images)

  return compare


def with_hidden_head(tmp_path: Path, images: np.ndarray, timm):
  """Compare with timm's features, and a hidden layer and head in float64, as timm lacks them."""
  config = ModelConfig(variant='B/16', **TINY, hidden_head=True)
  flat = google_file(tmp_path / 'file.npz', config, classes=10, size=SIZE)
  theirs = timm_model(timm, config, 0, SIZE)
  theirs.load_pretrained(str(tmp_path / 'file.npz'))
  dense = lambda x, name: x @ flat[f'{name}/kernel'].astype(np.float64) + flat[f'{name}/bias']
  return vit_jax.load(str(tmp_path / 'file.npz')).logits(images), dense(
    np.tanh(dense(run(theirs, images), 'pre_logits')), 'head'
  )


def optimizer_state(tmp_path: Path, images: np.ndarray, timm):
  """Compare a file with the optimizer's state, such as SAM's S/16."""
  config = ModelConfig(variant='B/16', **TINY)
  arrays = {
    f'opt/target/{name}': array for name, array in to_google(draw(config, 10, SIZE)).items()
  }
  moments = {
    name.replace('target', 'state/param_states'): array * 2 for name, array in arrays.items()
  }
  np.savez(tmp_path / 'file.npz', **arrays, **moments, **{'opt/state/step': np.array(7)})
  theirs = timm_model(timm, config, 10, SIZE)
  theirs.load_pretrained(str(tmp_path / 'file.npz'))
  return vit_jax.load(str(tmp_path / 'file.npz')).logits(images), run(theirs, images)


def gsam(tmp_path: Path, images: np.ndarray, timm):
  """Compare a model without a class token, pooled by the mean.

  timm reads such models only in big_vision's names.
  """
  config = ModelConfig(variant='B/16', **TINY, pool='gap')
  flat = google_file(tmp_path / 'file.npz', config, classes=10, size=SIZE)
  np.savez(
    tmp_path / 'plain.npz', **big_vision_arrays(flat, pool='gap', scanned=False, prefix='params/')
  )
  theirs = timm_model(timm, config, 10, SIZE, **POOLS['gap'])
  theirs.load_pretrained(str(tmp_path / 'plain.npz'))
  return vit_jax.load(str(tmp_path / 'file.npz')).logits(images), run(theirs, images)


POOLS = {
  'token': {'no_embed_class': True},
  'gap': {'class_token': False, 'fc_norm': False, 'global_pool': 'avg'},
  'map': {'class_token': False, 'fc_norm': False, 'global_pool': 'map'},
}
NEWER = {
  'MultiHeadDotProductAttention_1': 'MultiHeadDotProductAttention_0',
  'LayerNorm_2': 'LayerNorm_1',
  'MlpBlock_3': 'MlpBlock_0',
}


def big_vision(*, pool: str, scanned: bool, prefix: str = 'params/', half: bool = False):
  """Compare big_vision's layout, with stacked blocks (`scanned`) or bfloat16 (`half`).

  The position embeddings have no row for the class token.
  """

  def compare(tmp_path: Path, images: np.ndarray, timm):
    config, classes = ModelConfig(variant='B/16', **TINY, pool=pool), 0 if pool == 'map' else 10
    flat = draw(config, classes, SIZE)
    if half:
      flat = {
        name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in flat.items()
      }
    arrays = big_vision_arrays(flat, pool=pool, scanned=scanned, prefix=prefix)
    stored = {
      name: array.astype(ml_dtypes.bfloat16).view('V2') if half else array
      for name, array in arrays.items()
    }
    np.savez(tmp_path / 'file.npz', **stored, **{'chrono/step': np.array(3)})
    np.savez(tmp_path / 'plain.npz', **arrays)
    theirs = timm_model(timm, config, classes, SIZE, **POOLS[pool])
    theirs.load_pretrained(str(tmp_path / 'plain.npz'))
    ours = vit_jax.load(str(tmp_path / 'file.npz'))
    return (ours.logits if classes else ours.features)(images), run(theirs, images)

  return compare


def big_vision_arrays(
  flat: dict, *, pool: str, scanned: bool, prefix: str
) -> dict[str, np.ndarray]:
  """Rename our flat tree to big_vision's names."""
  arrays = dict(flat if scanned else to_google(flat))
  table = arrays.pop('Transformer/posembed_input/pos_embedding')
  if pool == 'token':  # big_vision has no position embedding for the class token.
    arrays['cls'], table = arrays['cls'] + table[:, :1], table[:, 1:]
  out = {'pos_embedding': table}
  for name, array in arrays.items():
    for old, new in NEWER.items():
      name = name.replace(old, new)
    out[name] = array
  return {prefix + name: array for name, array in out.items()}


def hybrid(variant: str, name: str, *, size: tuple[int, int], **fields):
  """Compare a hybrid, with timm changed to the epsilons of the released code.

  timm standardizes kernels by sqrt(variance + 1e-8) and has an epsilon of 1e-5 in its norms. The
  released code standardizes by deviation + 1e-5 and has 1e-6.
  """

  def compare(tmp_path: Path, images: np.ndarray, timm):
    import torch

    config = ModelConfig(variant=variant, **fields)
    google_file(tmp_path / 'file.npz', config, classes=10, size=size)
    kwargs = {'depth': fields['depth']} if fields else {}
    theirs = timm.create_model(name, img_size=size, num_classes=10, act_layer='gelu_tanh', **kwargs)
    theirs.load_pretrained(str(tmp_path / 'file.npz'))
    with torch.no_grad():
      for module in theirs.patch_embed.backbone.modules():
        if isinstance(module, torch.nn.GroupNorm):
          module.eps = 1e-6
        if isinstance(module, torch.nn.Conv2d):
          w = module.weight - module.weight.mean(dim=(1, 2, 3), keepdim=True)
          deviation = w.std(dim=(1, 2, 3), keepdim=True, unbiased=False)
          # `use_plain_convolutions` removes timm's own standardization.
          module.weight.copy_(w / (deviation + 1e-5))
          module.eps = 0.0
          module.scale_by = (deviation / (deviation + 1e-5)).flatten()
    use_plain_convolutions(theirs)
    return vit_jax.load(str(tmp_path / 'file.npz')).logits(images), run(theirs, images)

  return compare


def use_plain_convolutions(model):
  """Replace the convolutions of a stem by plain ones: their kernels are standardized already."""
  import types

  import torch
  from timm.layers import pad_same

  def forward(self, x):
    x = pad_same(x, self.kernel_size, self.stride, self.dilation)
    return torch.nn.functional.conv2d(
      x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
    )

  for module in model.patch_embed.backbone.modules():
    if hasattr(module, 'scale_by'):
      module.forward = types.MethodType(forward, module)


def redrawn(model, seed: int = 0):
  """Replace every tensor of a PyTorch model by random values at the scale of trained ones.

  The statistics of batch norms are among them.
  """
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, tensor in model.named_parameters():
      noise = torch.randn(tensor.shape, generator=generator)
      is_scale = name.endswith(
        ('norm.weight', 'norm1.weight', 'norm2.weight', 'norm3.weight', 'gamma', 'lambda1')
      )
      is_scale |= name.endswith(('bn1.weight', 'bn2.weight', 'bn3.weight'))
      is_scale |= 'layernorm' in name and name.endswith('weight')
      is_scale |= 'layrnorm' in name and name.endswith('weight')
      is_scale |= name.endswith(('gamma_1', 'gamma_2', 'lambda_1', 'lambda_2'))
      if name.endswith('relative_position_bias_table'):
        tensor.copy_(noise)
      elif is_scale:
        tensor.copy_(1 + 0.1 * noise)
      elif tensor.ndim > 1 and name.endswith('weight'):
        tensor.copy_(noise / tensor[0].numel() ** 0.5)
      else:
        tensor.copy_(0.1 * noise)
    for name, tensor in model.named_buffers():
      if name.endswith('running_var'):
        tensor.copy_(torch.exp(0.1 * torch.randn(tensor.shape, generator=generator)))
      elif name.endswith('running_mean'):
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
  return model.eval()


def timm_file(
  name: str, *, headless: bool = False, size: tuple[int, int] = SIZE, pool: str = '', **kwargs
):
  """Compare a timm model, saved as safetensors with the config.json of timm's hub.

  `pool` is the pooling that config.json states, if it is not '', and that timm's model has.
  """

  def compare(tmp_path: Path, images: np.ndarray, timm):
    import json

    from safetensors.torch import save_file

    sizes = {'patch_size': 16, 'embed_dim': 48, 'depth': 3, 'num_heads': 3}
    small = {'img_size': size} | sizes | ({'global_pool': pool} if pool else {}) | kwargs
    theirs = redrawn(timm.create_model(name, num_classes=0 if headless else 10, **small))
    save_file(theirs.state_dict(), tmp_path / 'model.safetensors')
    arguments = {
      key: value for key, value in small.items() if key in ('num_heads', 'act_layer', 'fc_norm')
    }
    statistics = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
    pretrained = statistics | {'input_size': (3, *size), 'crop_pct': 0.9}
    config = {'architecture': name, 'model_args': arguments, 'pretrained_cfg': pretrained}
    config |= {'global_pool': pool} if pool else {}
    (tmp_path / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    expected = run(theirs, images, mean=(123.675, 116.28, 103.53), scale=(58.395, 57.12, 57.375))
    del theirs  # Large models do not fit into memory twice.
    ours = vit_jax.load(str(tmp_path))
    assert ours.preprocessing.crop == 'center'
    return (ours.features if headless else ours.logits)(images), expected

  return compare


def distilled_features(tmp_path: Path, images: np.ndarray, timm):
  """Compare the class and distillation tokens of a distilled DeiT, side by side."""
  import torch

  save_and_read = timm_file('deit_tiny_distilled_patch16_224')
  ours, _ = save_and_read(tmp_path, images, timm)
  assert ours.shape == (len(images), 10)
  sizes = {'img_size': SIZE, 'patch_size': 16, 'embed_dim': 48, 'depth': 3, 'num_heads': 3}
  theirs = redrawn(timm.create_model('deit_tiny_distilled_patch16_224', num_classes=10, **sizes))
  with torch.no_grad():
    pixels = normalised(images, mean=(123.675, 116.28, 103.53), scale=(58.395, 57.12, 57.375))
    tokens = theirs.forward_features(pixels).numpy()
  return vit_jax.load(str(tmp_path)).features(images), tokens[:, :2].reshape(len(images), -1)


def resampled_beit(tmp_path: Path, images: np.ndarray, timm):
  """Compare a BEiT for images of 64x64 with timm's after its `set_input_size`."""
  import torch
  from safetensors.torch import save_file

  sizes = {'img_size': SIZE, 'patch_size': 16, 'embed_dim': 48, 'depth': 3, 'num_heads': 3}
  theirs = redrawn(timm.create_model('beit_base_patch16_224', num_classes=10, **sizes))
  save_file(theirs.state_dict(), tmp_path / 'model.safetensors')
  with warnings.catch_warnings():  # timm's interpolation copies a transposed array.
    warnings.simplefilter('ignore')
    theirs.set_input_size(images.shape[1:3])
  with torch.no_grad():
    expected = theirs(normalised(images)).numpy()
  ours = vit_jax.load(str(tmp_path), heads=3, size=images.shape[1:3], mean=0.5, std=0.5)
  return ours.logits(images), expected


def vit5(*, width: int, depth: int, heads: int, size: tuple[int, int]):
  """Compare a file in the names of ViT-5's authors with their equations in float64."""

  def compare(tmp_path: Path, images: np.ndarray, timm):
    from safetensors.numpy import save_file

    arrays = vit5_arrays(width=width, depth=depth, heads=heads, grid=size[0] // 16, classes=10)
    save_file(arrays, tmp_path / 'model.safetensors')
    ours = vit_jax.load(str(tmp_path / 'model.safetensors'), mean=0.5, std=0.5)
    return ours.logits(images), vit5_logits(arrays, images, heads=heads)

  return compare


def tower(kind: str, *, size: tuple[int, int] = SIZE, **fields):
  """Compare an image tower of transformers, or DINOv3, saved by its own save_pretrained.

  Images of another size than 64x64 need position embeddings that are resampled, or rotary ones.
  """

  def compare(tmp_path: Path, images: np.ndarray, transformers):
    import torch

    sizes = {'hidden_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 3}
    sizes |= {'image_size': SIZE[0], 'patch_size': 16, 'intermediate_size': 96} | fields
    family = kind.removesuffix('Model').removesuffix('VisionModelWithProjection')
    family = family.removesuffix('Vision')
    config = getattr(transformers, f'{family}{"" if family == "DINOv3ViT" else "Vision"}Config')
    if kind in ('CLIPModel', 'SiglipModel'):
      text = {'hidden_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2}
      text |= {'intermediate_size': 32, 'vocab_size': 99, 'bos_token_id': 1, 'eos_token_id': 2}
      config = getattr(transformers, f'{family}Config')(vision_config=sizes, text_config=text)
    else:
      config = config(**sizes)
    theirs = redrawn(getattr(transformers, kind)(config))
    theirs.save_pretrained(tmp_path)
    pixels = normalised(images)
    resampled = {} if family == 'DINOv3ViT' else {'interpolate_pos_encoding': size != SIZE}
    with torch.no_grad():
      if kind in ('CLIPModel', 'SiglipModel'):
        out = theirs.get_image_features(pixels, **resampled)
      else:
        out = theirs(pixels, **resampled)
    ours = vit_jax.load(str(tmp_path), mean=0.5, std=0.5, size=size, positions='bicubic')
    if kind == 'CLIPVisionModelWithProjection':
      return ours.logits(images), out.image_embeds.numpy()
    if kind == 'CLIPModel':
      return ours.logits(images), out.pooler_output.numpy()
    return ours.features(images), out.pooler_output.numpy()

  return compare


def huggingface(kind: str, *, size: tuple[int, int] = SIZE, **fields):
  """Compare a Hugging Face model, saved by its own save_pretrained.

  Images of another size than 64x64 need position embeddings that are resampled.
  """

  def compare(tmp_path: Path, images: np.ndarray, transformers):
    import torch

    config, model = (getattr(transformers, name) for name in HUGGINGFACE[kind])
    sizes = {'hidden_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 3}
    sizes |= {'image_size': SIZE[0], 'patch_size': 16}
    sizes |= {'num_labels': 10} if 'Classification' in kind else {}
    theirs = redrawn(model(config(**sizes | fields)))
    theirs.save_pretrained(tmp_path)
    resampled = {} if size == SIZE else {'interpolate_pos_encoding': True}
    with torch.no_grad():
      out = theirs(normalised(images), **resampled)
    ours = vit_jax.load(str(tmp_path), mean=0.5, std=0.5, size=size, positions='bicubic')
    if 'Classification' in kind:
      return ours.logits(images), out.logits.numpy()
    return ours.features(images), out.pooler_output.numpy()

  return compare


def masked_autoencoder(tmp_path: Path, images: np.ndarray, transformers):
  """Compare the encoder of an MAE, saved with its decoder. No patch is masked."""
  import torch

  config = transformers.ViTMAEConfig(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192,
    image_size=SIZE[0], patch_size=16, mask_ratio=0.0,
    decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
    decoder_intermediate_size=64,
  )  # fmt: skip
  theirs = redrawn(transformers.ViTMAEForPreTraining(config))
  theirs.save_pretrained(tmp_path)
  with torch.no_grad():
    expected = theirs.vit(normalised(images)).last_hidden_state[:, 0].numpy()
  ours = vit_jax.load(str(tmp_path), mean=0.5, std=0.5)
  assert any('only pre-training uses' in note for note in ours.notes)
  return ours.features(images), expected


HUGGINGFACE = {
  'DeiTForImageClassificationWithTeacher': ('DeiTConfig', 'DeiTForImageClassificationWithTeacher'),
  'BeitForImageClassification': ('BeitConfig', 'BeitForImageClassification'),
  'BeitModel': ('BeitConfig', 'BeitModel'),
  'Data2VecVisionForImageClassification': (
    'Data2VecVisionConfig',
    'Data2VecVisionForImageClassification',
  ),
  'ViTForImageClassification': ('ViTConfig', 'ViTForImageClassification'),
  'ViTModel': ('ViTConfig', 'ViTModel'),
  'Dinov2Model': ('Dinov2Config', 'Dinov2Model'),
  'Dinov2WithRegistersModel': ('Dinov2WithRegistersConfig', 'Dinov2WithRegistersModel'),
}


def run_directory(tmp_path: Path, images: np.ndarray, timm):
  """Compare a run directory with the same parameters in timm."""
  import jax

  from vit_jax.checkpoint.manager import CheckpointManager
  from vit_jax.checkpoint.run_directory import write_run_description
  from vit_jax.config import Config, DataConfig
  from vit_jax.models.vit import build_vit
  from vit_jax.optim.optimizer import make_lr_schedule, make_optimizer
  from vit_jax.step import abstract_params, init_state

  model_config = ModelConfig(variant='B/16', **TINY, gelu='erf')
  config = Config(data=DataConfig(size=SIZE), model=model_config, steps=1)
  model = build_vit(model_config, 10)
  tx = make_optimizer(
    config.optim, make_lr_schedule(config.optim, steps=1, epoch=1), abstract_params(model, SIZE)
  )
  state = init_state(0, model=model, tx=tx, size=SIZE, ema=False)
  import flax.traverse_util

  params = flax.traverse_util.unflatten_dict(draw(model_config, 10, SIZE), sep='/')
  write_run_description(tmp_path / 'run', config, tuple('abcdefghij'))
  checkpoints = CheckpointManager(tmp_path / 'run')
  checkpoints.save(state.replace(params=jax.tree.map(jax.numpy.asarray, params)), 1)
  checkpoints.close()
  np.savez(tmp_path / 'file.npz', **to_google(draw(model_config, 10, SIZE)))
  theirs = timm_model(timm, model_config, 10, SIZE, act_layer='gelu')
  theirs.load_pretrained(str(tmp_path / 'file.npz'))
  return vit_jax.load(str(tmp_path / 'run')).logits(images), run(theirs, images)


NPZ, SAFE, HUB = 'Google `.npz`', '`.safetensors`', 'Hugging Face directory'
S224, S384, S112, S96, S64X96 = (224, 224), (384, 384), (112, 112), (96, 96), (64, 96)
# fmt: off
FAMILIES = [
  Family('ViT, 2020: ImageNet-21k with its hidden layer', NPZ, 'timm, NumPy in float64',
         with_hidden_head),
  Family('ViT, 2020: fine-tuned; augreg; SAM: Ti/16', NPZ, 'timm',
         google('Ti/16', size=S224), S224),
  Family('… S/32', NPZ, 'timm', google('S/32', size=S224), S224),
  Family('… B/16', NPZ, 'timm', google('B/16', size=S224, classes=1000), S224, slow=True),
  Family('… B/16 at 384 px', NPZ, 'timm', google('B/16', size=S384, classes=1000), S384, slow=True),
  Family('… L/16', NPZ, 'timm', google('L/16', size=S224, classes=1000), S224, slow=True),
  Family('… L/16 at 384 px', NPZ, 'timm', google('L/16', size=S384, classes=1000), S384, slow=True),
  Family('SAM: an optimizer state, `opt/target/`', NPZ, 'timm', optimizer_state),
  Family('GSAM: pooled by the mean', NPZ, 'timm', gsam),
  Family('hybrid R+Ti/16', NPZ, 'timm',
         hybrid('R+Ti/16', 'vit_tiny_r_s16_p8_224', size=S96), S96),
  Family('hybrid R26+S/32', NPZ, 'timm',
         hybrid('R26+S/32', 'vit_small_r26_s32_224', size=S96), S96),
  Family('hybrid R50+B/16', NPZ, 'timm',
         hybrid('R50+B/16', 'vit_base_r50_s16_224', size=S224), S224, slow=True),
  Family('hybrid R50+L/32', NPZ, 'timm',
         hybrid('R50+L/32', 'vit_large_r50_s32_224', size=S224), S224, slow=True),
  Family('big_vision: class token', NPZ, 'timm', big_vision(pool='token', scanned=False)),
  Family('big_vision: mean of the patches, stacked blocks', NPZ, 'timm',
         big_vision(pool='gap', scanned=True)),
  Family('big_vision: MAP head', NPZ, 'timm', big_vision(pool='map', scanned=False)),
  Family('big_vision: images of two towers (SigLIP)', NPZ, 'timm',
         big_vision(pool='map', scanned=True, prefix='params/img/')),
  Family('big_vision: bfloat16 as raw bytes', NPZ, 'timm',
         big_vision(pool='gap', scanned=True, half=True)),
  Family('timm `vit_*`, `deit_*`', SAFE, 'timm', timm_file('vit_tiny_patch16_224')),
  Family('timm without biases of q, k and v', SAFE, 'timm',
         timm_file('vit_tiny_patch16_224', qkv_bias=False)),
  Family('timm DeiT', SAFE, 'timm', timm_file('deit_tiny_patch16_224')),
  Family('timm DINO', SAFE, 'timm', timm_file('vit_small_patch16_224', headless=True)),
  Family('timm DINOv2', SAFE, 'timm',
         timm_file('vit_small_patch14_dinov2', headless=True)),
  Family('timm DINOv2 with registers', SAFE, 'timm',
         timm_file('vit_small_patch14_reg4_dinov2', headless=True)),
  Family('timm SigLIP (MAP head)', SAFE, 'timm',
         timm_file('vit_base_patch16_siglip_224', headless=True)),
  Family('timm DINOv2-g (SwiGLU)', SAFE, 'timm',
         timm_file('vit_giant_patch14_dinov2', headless=True)),
  Family('… DINOv2-g at its size, images of 112x112', SAFE, 'timm',
         timm_file('vit_giant_patch14_dinov2', size=S112, headless=True, patch_size=14,
                   embed_dim=1536, depth=40, num_heads=24), S112, slow=True),
  Family('timm DINOv3 ViT-S, B, L (RoPE)', SAFE, 'timm',
         timm_file('vit_small_patch16_dinov3', headless=True, pool='token')),
  Family('… DINOv3 with biases of q and v, images of 64x96', SAFE, 'timm',
         timm_file('vit_base_patch16_dinov3_qkvb', size=S64X96, pool='token'), S64X96),
  Family('… DINOv3 ViT-S at its size', SAFE, 'timm',
         timm_file('vit_small_patch16_dinov3', size=S224, pool='token', embed_dim=384, depth=12,
                   num_heads=6), S224, slow=True),
  Family('… DINOv3 ViT-B at its size', SAFE, 'timm',
         timm_file('vit_base_patch16_dinov3', size=S224, headless=True, pool='token',
                   embed_dim=768, depth=12, num_heads=12), S224, slow=True),
  Family('… DINOv3 ViT-L at its size', SAFE, 'timm',
         timm_file('vit_large_patch16_dinov3', size=S224, headless=True, pool='token',
                   embed_dim=1024, depth=24, num_heads=16), S224, slow=True),
  Family('timm DINOv3 ViT-S+, H+, 7B (SwiGLU)', SAFE, 'timm',
         timm_file('vit_huge_plus_patch16_dinov3', size=S64X96, pool='token'), S64X96),
  Family('… DINOv3 ViT-S+ at its size', SAFE, 'timm',
         timm_file('vit_small_plus_patch16_dinov3', size=S224, headless=True, pool='token',
                   embed_dim=384, depth=12, num_heads=6), S224, slow=True),
  Family('… DINOv3 ViT-H+ at its size, images of 96x96', SAFE, 'timm',
         timm_file('vit_huge_plus_patch16_dinov3', size=S96, headless=True, pool='token',
                   embed_dim=1280, depth=32, num_heads=20), S96, slow=True),
  Family('… DINOv3 ViT-7B at its width, with 2 of its 40 blocks', SAFE, 'timm',
         timm_file('vit_7b_patch16_dinov3', size=S96, headless=True, pool='token',
                   embed_dim=4096, depth=2, num_heads=32), S96, slow=True),
  Family('… DINOv3 pooled by the mean, as timm does', SAFE, 'timm',
         timm_file('vit_7b_patch16_dinov3', num_heads=2)),
  Family('timm CLIP, OpenCLIP', SAFE, 'timm', timm_file('vit_base_patch16_clip_224')),
  Family('… CLIP B/32 at its size', SAFE, 'timm',
         timm_file('vit_base_patch32_clip_224', size=S224, patch_size=32, embed_dim=768, depth=12,
                   num_heads=12), S224, slow=True),
  Family('… CLIP with quick GELU, images of 64x96', SAFE, 'timm',
         timm_file('vit_base_patch16_clip_quickgelu_224', size=S64X96), S64X96),
  Family('timm SigLIP 2, tanh GELU', SAFE, 'timm',
         timm_file('vit_giantopt_patch16_siglip_256', headless=True, size=S64X96), S64X96),
  Family('… SigLIP B/32 at its size', SAFE, 'timm',
         timm_file('vit_base_patch32_siglip_256', headless=True, size=(256, 256), patch_size=32,
                   embed_dim=768, depth=12, num_heads=12), (256, 256)),
  Family('timm SigLIP pooled by the mean', SAFE, 'timm',
         timm_file('vit_base_patch16_siglip_gap_224')),
  Family('timm distilled DeiT', SAFE, 'timm', timm_file('deit_tiny_distilled_patch16_224')),
  Family('… its two tokens', SAFE, 'timm', distilled_features),
  Family('… distilled DeiT-B at its size', SAFE, 'timm',
         timm_file('deit_base_distilled_patch16_224', size=S224, embed_dim=768, depth=12,
                   num_heads=12), S224, slow=True),
  Family('timm BEiT', SAFE, 'timm', timm_file('beit_base_patch16_224')),
  Family('… BEiT-2, images of 64x96', SAFE, 'timm',
         timm_file('beitv2_base_patch16_224', size=S64X96), S64X96),
  Family('… BEiT with a table that all blocks share', SAFE, 'timm',
         timm_file('beit_base_patch16_224', use_rel_pos_bias=False, use_shared_rel_pos_bias=True)),
  Family('… BEiT resampled from 64x64 to 96x160', SAFE, 'timm', resampled_beit, (96, 160)),
  Family('… BEiT-B at its size', SAFE, 'timm',
         timm_file('beit_base_patch16_224', size=S224, embed_dim=768, depth=12, num_heads=12),
         S224, slow=True),
  Family('… BEiT-L at its size', SAFE, 'timm',
         timm_file('beit_large_patch16_224', size=S224, embed_dim=1024, depth=24, num_heads=16),
         S224, slow=True),
  Family('timm EVA', SAFE, 'timm', timm_file('eva_giant_patch14_224')),
  Family('timm EVA-02 Ti, S', SAFE, 'timm', timm_file('eva02_tiny_patch14_336')),
  Family('timm EVA-02 B, L, images of 64x96', SAFE, 'timm',
         timm_file('eva02_base_patch14_448', size=S64X96), S64X96),
  Family('… EVA-02 B at its size', SAFE, 'timm',
         timm_file('eva02_base_patch14_224', size=S224, patch_size=14, embed_dim=768, depth=12,
                   num_heads=12), S224, slow=True),
  Family('ViT-5', SAFE, 'NumPy in float64', vit5(width=48, depth=3, heads=3, size=SIZE)),
  Family('… ViT-5-B at its size', SAFE, 'NumPy in float64',
         vit5(width=768, depth=12, heads=12, size=S224), S224, slow=True),
  Family('timm DeiT III', SAFE, 'timm', timm_file('deit3_small_patch16_224')),
  Family('timm with registers and `fc_norm`', SAFE, 'timm',
         timm_file('vit_medium_patch16_reg4_gap_256')),
  Family('timm, fine-tuned MAE: `fc_norm` and a class token', SAFE, 'timm',
         timm_file('vit_base_patch16_224', pool='avg')),
  Family('timm with `qk_norm`', SAFE, 'timm',
         timm_file('vit_tiny_patch16_224', qk_norm=True)),
  Family('`ViTForImageClassification`', HUB, 'transformers',
         huggingface('ViTForImageClassification')),
  Family('`ViTModel` with its pooler', HUB, 'transformers',
         huggingface('ViTModel', hidden_act='gelu_pytorch_tanh')),
  Family('`DeiTForImageClassificationWithTeacher`', HUB, 'transformers',
         huggingface('DeiTForImageClassificationWithTeacher')),
  Family('… distilled DeiT, images of 64x96', HUB, 'transformers',
         huggingface('DeiTForImageClassificationWithTeacher', size=S64X96), S64X96),
  Family('`BeitForImageClassification`', HUB, 'transformers',
         huggingface('BeitForImageClassification', use_relative_position_bias=True)),
  Family('`BeitModel` with a table that all blocks share', HUB, 'transformers',
         huggingface('BeitModel', use_shared_relative_position_bias=True)),
  Family('`Data2VecVisionForImageClassification`', HUB, 'transformers',
         huggingface('Data2VecVisionForImageClassification', use_relative_position_bias=True)),
  Family('`Dinov2Model`', HUB, 'transformers', huggingface('Dinov2Model')),
  Family('`Dinov2WithRegistersModel`', HUB, 'transformers',
         huggingface('Dinov2WithRegistersModel')),
  Family('`Dinov2Model` with `use_swiglu_ffn`', HUB, 'transformers',
         huggingface('Dinov2Model', use_swiglu_ffn=True)),
  Family('`DINOv3ViTModel`', HUB, 'transformers',
         tower('DINOv3ViTModel', num_register_tokens=4)),
  Family('… DINOv3 with SwiGLU, no registers, images of 64x96', HUB, 'transformers',
         tower('DINOv3ViTModel', size=S64X96, use_gated_mlp=True,
               hidden_act='silu', rope_theta=50.0), S64X96),
  Family('`CLIPVisionModel`', HUB, 'transformers', tower('CLIPVisionModel')),
  Family('… CLIP, images of 64x96', HUB, 'transformers',
         tower('CLIPVisionModel', size=S64X96), S64X96),
  Family('`CLIPVisionModelWithProjection`', HUB, 'transformers',
         tower('CLIPVisionModelWithProjection', projection_dim=24, hidden_act='gelu')),
  Family('`CLIPModel`, its image tower', HUB, 'transformers', tower('CLIPModel')),
  Family('`SiglipVisionModel`', HUB, 'transformers', tower('SiglipVisionModel')),
  Family('… SigLIP, images of 64x96', HUB, 'transformers',
         tower('SiglipVisionModel', size=S64X96), S64X96),
  Family('`SiglipModel`, its image tower', HUB, 'transformers', tower('SiglipModel')),
  Family('`ViTMAEForPreTraining`, its encoder', HUB, 'transformers', masked_autoencoder),
  Family('run directory', 'the directory', 'timm', run_directory),
]
# fmt: on


def parity_figures(output: str) -> dict[str, str]:
  """Return {family: difference} of the lines that test_parity.py prints."""
  names = {family.name for family in FAMILIES}
  rows = (line.lstrip('.').rpartition(': ') for line in output.splitlines())
  return {name: difference for name, _, difference in rows if name in names}


def markdown(figures: dict[str, str]) -> str:
  """Return the table of docs/guides/checkpoints.md."""
  rows = [
    '| model family | files | checked against | largest difference |',
    '|---|---|---|---|',
  ]
  rows += [
    f'| {family.name} | {family.files} | {family.against} | {figures[family.name]} |'
    for family in FAMILIES
  ]
  return '\n'.join(rows)


if __name__ == '__main__':
  recorded = json.loads(FIGURES.read_text(encoding='utf-8')) if FIGURES.exists() else {}
  recorded |= parity_figures(sys.stdin.read())
  recorded = {family.name: recorded[family.name] for family in FAMILIES}
  text = json.dumps(recorded, indent=2, ensure_ascii=False)
  FIGURES.write_text(text + '\n', encoding='utf-8')
  print(markdown(recorded))
