"""Muon: momentum whose matrices are orthogonalized (https://kellerjordan.github.io/posts/muon/).

The kernels of hidden linear layers are updated as matrices [inputs, outputs], those of each block
alone. Queries, keys and values are three matrices over all heads. The author advises AdamW for
embeddings, the first convolution, the head, gains and biases. Here all convolutions have it, since
`torch.optim.Muon` takes matrices alone. So have positions, adapters and all else.

Shapes: m n the sides of a matrix, … the depth of stacked blocks, if there is one.
"""

import math

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import OptimConfig
from vit_jax.models.lora import block_shape, input_axes
from vit_jax.models.variants import AXIAL_RESNET_HEADS
from vit_jax.optim.param_paths import param_path
from vit_jax.sharding.mesh import split_matrices

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Coefficients of x, x³ and x⁵, by Keller Jordan.
NEWTON_SCHULZ_STEPS = 5
MIN_NORM = 1e-7
# The root mean square of Adam's updates, which those of a matrix get (arXiv 2502.16982). Learning
# rate and weight decay of AdamW then suit both.
ADAM_RMS = 0.2
NOT_HIDDEN = ('embedding/', 'head/', 'patch_head/')
FUSED_KERNEL = '/qkv/kernel'  # Of axial ResNets: [c, heads · (query, key, value)].


def scale_by_muon(config: OptimConfig) -> optax.GradientTransformation:
  """Orthogonalize the Nesterov momentum of hidden matrices, and apply Adam to all other parameters.

  It equals `torch.optim.Muon` with `adjust_lr_fn='match_rms_adamw'`, without the learning rate.
  `optax.contrib.muon` differs: it corrects the bias of the momentum before Nesterov's step.
  """
  trace = optax.trace(config.muon_momentum, nesterov=True, accumulator_dtype=config.momentum_dtype)
  # The labels are part of checkpoint paths.
  rules = {
    'muon': optax.chain(trace, optax.stateless(orthogonalize_updates)),
    'adam': optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=config.momentum_dtype),
  }
  return optax.partition(rules, label_by_rule)


def label_by_rule(params):
  """Return a tree with 'muon' for each hidden matrix and 'adam' for the other parameters."""
  label = lambda keys, x: 'muon' if is_hidden_matrix(param_path(keys), x.shape) else 'adam'
  return jax.tree.map_with_path(label, params)


def is_hidden_matrix(path: str, shape: tuple[int, ...]) -> bool:
  """Return whether a parameter is the kernel of a linear layer between embedding and head.

  Kernels of convolutions have four axes, those of linear layers two, or three with heads.
  """
  is_kernel = path.rpartition('/')[2] == 'kernel' and not path.startswith(NOT_HIDDEN)
  return is_kernel and len(block_shape(path, shape)) in (2, 3)


def orthogonalize_updates(updates, params=None):
  """Orthogonalize all updates, and give them the root mean square of Adam's."""
  del params
  return jax.tree.map_with_path(lambda keys, x: orthogonalize_kernel(param_path(keys), x), updates)


def orthogonalize_kernel(path: str, kernel: jax.Array) -> jax.Array:
  """Orthogonalize the matrix of each block, or the three matrices of a fused kernel."""
  own = block_shape(path, kernel.shape)
  if path.endswith(FUSED_KERNEL):
    c, width = own
    by_head = kernel.reshape(c, AXIAL_RESNET_HEADS, -1)
    quarter = width // AXIAL_RESNET_HEADS // 4
    parts = jnp.split(by_head, [quarter, 2 * quarter], axis=-1)
    parts = [orthogonalize(x.reshape(c, -1)).reshape(x.shape) for x in parts]
    return jnp.concatenate(parts, axis=-1).reshape(kernel.shape)
  split = input_axes(path, own)
  depth = kernel.shape[: kernel.ndim - len(own)]
  matrices = kernel.reshape(*depth, math.prod(own[:split]), math.prod(own[split:]))
  return orthogonalize(matrices).reshape(kernel.shape)


def orthogonalize(x: jax.Array) -> jax.Array:
  """Return 0.2 √max(m, n) · U Vᵀ, approximately, for each x = U S Vᵀ of […, m, n].

  Without the layout of `split_matrices`, each iteration on parameters that are split over 'fsdp'
  has several collectives.
  """
  if x.ndim == 2:
    return orthogonalize(x[None])[0]
  m, n = x.shape[-2:]
  x = split_matrices(x.mT if m > n else x)
  a, b, c = NEWTON_SCHULZ
  x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), MIN_NORM)
  for _ in range(NEWTON_SCHULZ_STEPS):
    gram = x @ x.mT
    x = a * x + (b * gram + c * gram @ gram) @ x
  return ADAM_RMS * math.sqrt(max(m, n)) * (x.mT if m > n else x)
