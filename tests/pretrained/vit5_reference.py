"""ViT-5 (arXiv 2602.08071) in NumPy and float64, and files of it with random arrays.

The names are those of the authors' checkpoints (github.com/wangf3014/ViT-5). There is no package of
the model to compare with.
"""

import numpy as np
import scipy.special

PATCH, REGISTERS, EPS = 16, 4, 1e-6
PATCH_BASE, REGISTER_BASE = 10_000.0, 100.0


def vit5_arrays(
  *, width: int, depth: int, heads: int, grid: int, classes: int
) -> dict[str, np.ndarray]:
  """Return the arrays of a file, all drawn at random but the angles."""
  rng, channels = np.random.default_rng(0), width // heads
  weight = lambda out, inside: rng.normal(size=(out, inside)) / inside**0.5
  vector = lambda n: 0.1 * rng.normal(size=n)
  scale = lambda n: 1 + vector(n)
  angles = lambda base: base ** -(np.arange(channels // 4) / (channels // 4))
  arrays = {
    'cls_token': vector((1, 1, width)),
    'reg_token': vector((1, REGISTERS, width)),
    'pos_embed': vector((1, grid * grid, width)),
    'patch_embed.proj.weight': weight(width, 3 * PATCH**2).reshape(width, 3, PATCH, PATCH),
    'patch_embed.proj.bias': vector(width),
    'norm.weight': scale(width),
    'head.weight': weight(classes, width),
    'head.bias': vector(classes),
  }
  for i in range(depth):
    block = {
      'gamma_1': scale(width),
      'gamma_2': scale(width),
      'norm1.weight': scale(width),
      'norm2.weight': scale(width),
      'attn.qkv.weight': weight(3 * width, width),
      'attn.proj.weight': weight(width, width),
      'attn.proj.bias': vector(width),
      'attn.q_norm.weight': scale(channels),
      'attn.k_norm.weight': scale(channels),
      'attn.rope.freqs': angles(PATCH_BASE),
      'attn.rope_reg.freqs': angles(REGISTER_BASE),
      'mlp.fc1.weight': weight(4 * width, width),
      'mlp.fc1.bias': vector(4 * width),
      'mlp.fc2.weight': weight(width, 4 * width),
      'mlp.fc2.bias': vector(width),
    }
    arrays |= {f'blocks.{i}.{name}': array for name, array in block.items()}
  return {name: array.astype(np.float32) for name, array in arrays.items()}


def vit5_logits(arrays: dict[str, np.ndarray], images: np.ndarray, *, heads: int) -> np.ndarray:
  """Return the logits of uint8 images [b, h, w, 3], normalized to [-1, 1]."""
  arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
  kernel, (b, h, w, _) = arrays['patch_embed.proj.weight'], images.shape
  pixels = images / 127.5 - 1
  patches = pixels.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
  x = patches.reshape(b, -1, 3 * PATCH**2) @ kernel.reshape(len(kernel), -1).T
  x = x + arrays['patch_embed.proj.bias'] + arrays['pos_embed']
  repeated = lambda name: np.repeat(arrays[name], b, axis=0)
  x = np.concatenate([repeated('cls_token'), x, repeated('reg_token')], axis=1)
  grid, i = round((x.shape[1] - 1 - REGISTERS) ** 0.5), 0
  while f'blocks.{i}.norm1.weight' in arrays:
    prefix = f'blocks.{i}.'
    p = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    x = x + p['gamma_1'] * attend(rms_norm(x, p['norm1.weight']), p, heads, grid)
    y = rms_norm(x, p['norm2.weight']) @ p['mlp.fc1.weight'].T + p['mlp.fc1.bias']
    y = y / 2 * (1 + scipy.special.erf(y / np.sqrt(2)))
    x = x + p['gamma_2'] * (y @ p['mlp.fc2.weight'].T + p['mlp.fc2.bias'])
    i += 1
  return rms_norm(x[:, 0], arrays['norm.weight']) @ arrays['head.weight'].T + arrays['head.bias']


def rms_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Divide by the root of the mean of the squares."""
  return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * scale


def attend(x: np.ndarray, p: dict, heads: int, grid: int) -> np.ndarray:
  """Attend with normalized and rotated queries and keys, head by head."""
  qkv = (x @ p['attn.qkv.weight'].T).reshape(*x.shape[:2], 3, heads, -1)
  out = []
  for head in range(heads):
    q, k, v = (qkv[:, :, i, head] for i in range(3))
    q = rotate(rms_norm(q, p['attn.q_norm.weight']), p, grid)
    k = rotate(rms_norm(k, p['attn.k_norm.weight']), p, grid)
    weights = scipy.special.softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), axis=-1)
    out.append(weights @ v)
  return np.concatenate(out, axis=-1) @ p['attn.proj.weight'].T + p['attn.proj.bias']


def rotate(x: np.ndarray, p: dict, grid: int) -> np.ndarray:
  """Rotate neighboring channels [b, n, c] of patches and registers, as complex numbers."""
  pairs = x[..., ::2] + 1j * x[..., 1::2]
  side = round(REGISTERS**0.5)
  for first, places, angles in (
    (1, grid, p['attn.rope.freqs']),
    (1 + grid * grid, side, p['attn.rope_reg.freqs']),
  ):
    for i, (row, column) in enumerate(np.ndindex(places, places), start=first):
      pairs[:, i] *= np.exp(1j * np.concatenate([row * angles, column * angles]))
  return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)
