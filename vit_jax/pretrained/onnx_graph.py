"""Our model as an ONNX graph, node by node, with the `onnx` package's own helpers.

Written out rather than converted: the graph is as short as the model, and a converter follows one release of JAX. jax2onnx
0.13, the last for Python 3.11, does not trace flax's `nn.scan`, which is around our blocks.

Shapes: b batch, n tokens, d width, h heads, c channels of a head.
"""

from collections.abc import Sequence

import flax.traverse_util
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vit_jax.models.layers import sincos2d_embedding
from vit_jax.models.resnet import RESNET_V1
from vit_jax.models.variants import NORM_GROUPS
from vit_jax.pretrained.model import PretrainedModel

ONNX_OPSET = 20  # The first with Gelu.
ATTENTION_MODULE = 'MultiHeadDotProductAttention_1'


class OnnxGraph:
  """Nodes and constants as they are added; a value is known by its name."""

  def __init__(self):
    self.nodes, self.constants = [], []

  def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes):
    """Adds a node; the name of its output, or their list."""
    names = [f'{kind}_{len(self.nodes)}_{i}' for i in range(outputs)]
    self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
    return names[0] if outputs == 1 else names

  def constant(self, array: np.ndarray | Sequence[int] | int) -> str:
    """Adds an array, or integers that say a shape."""
    array = (
      np.asarray(array, np.int64)
      if not isinstance(array, np.ndarray)
      else np.ascontiguousarray(array, np.float32)
    )
    self.constants.append(numpy_helper.from_array(array, f'constant_{len(self.constants)}'))
    return self.constants[-1].name

  def reshape(self, x: str, *shape: int) -> str:
    """0 keeps an axis."""
    return self.op('Reshape', x, self.constant(shape))

  def dense(self, x: str, kernel: np.ndarray, bias: np.ndarray) -> str:
    """[…, i] -> […, o] by a kernel [i, o]."""
    return self.op(
      'Add', self.op('MatMul', x, self.constant(kernel)), self.constant(bias.reshape(-1))
    )

  def norm(self, x: str, params: dict, eps: float) -> str:
    """LayerNorm over the last axis."""
    scale, bias = self.constant(params['scale']), self.constant(params['bias'])
    return self.op('LayerNormalization', x, scale, bias, axis=-1, epsilon=eps)


def to_onnx(model: PretrainedModel) -> onnx.ModelProto:
  """'images' uint8 [b, h, w, 3] -> 'logits' [b, k], or 'features' [b, d] of a model without a head; b is free."""
  g, config, params = OnnxGraph(), model.config, model.params
  x = g.op('Cast', 'images', to=TensorProto.FLOAT)
  x = g.op('Sub', x, g.constant(np.array(config.mean, np.float32)))
  x = g.op('Div', x, g.constant(np.array(config.scale, np.float32)))
  if model.model.shape.stem:
    x = add_resnet_stem(g, x, params, model.model.shape.stem.blocks)
  x = add_encoder(g, add_patch_embedding(g, x, model), model)
  x = add_pooling(g, x, model)
  if config.hidden_head:
    x = g.op('Tanh', g.dense(x, **params['pre_logits']))
  out = 'logits' if model.classes else 'features'
  x = g.dense(x, **params['head']) if model.classes else x
  g.nodes.append(helper.make_node('Identity', [x], [out]))
  width = model.classes or model.model.shape.width
  images = helper.make_tensor_value_info('images', TensorProto.UINT8, ['b', *model.size, 3])
  result = helper.make_tensor_value_info(out, TensorProto.FLOAT, ['b', width])
  graph = helper.make_graph(g.nodes, 'vision_transformer', [images], [result], g.constants)
  made = helper.make_model(
    graph, opset_imports=[helper.make_opsetid('', ONNX_OPSET)], producer_name='vit_jax'
  )
  made.ir_version = 10  # Of that opset; the package's newest is ahead of runtimes.
  return made


def add_resnet_stem(g: OnnxGraph, x: str, params: dict, blocks: tuple[int, ...]) -> str:
  """The ResNet of a hybrid, [b, h, w, c] -> [b, h, w, c]; channels come second in between."""

  def conv(x: str, kernel: np.ndarray, stride: int) -> str:
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    kernel = (kernel / (kernel.std(axis=(0, 1, 2)) + RESNET_V1.std_eps)).transpose(3, 2, 0, 1)
    sides = list(kernel.shape[2:])
    return g.op(
      'Conv',
      x,
      g.constant(kernel),
      auto_pad='SAME_UPPER',
      kernel_shape=sides,
      strides=[stride, stride],
    )

  def norm(x: str, params: dict) -> str:  # A group is one row.
    ones, zeros = (
      g.constant(np.ones(NORM_GROUPS, np.float32)),
      g.constant(np.zeros(NORM_GROUPS, np.float32)),
    )
    rows = g.op(
      'InstanceNormalization',
      g.reshape(x, 0, NORM_GROUPS, -1),
      ones,
      zeros,
      epsilon=RESNET_V1.norm_eps,
    )
    x = g.op('Reshape', rows, g.op('Shape', x))
    x = g.op('Mul', x, g.constant(params['scale'].reshape(-1, 1, 1)))
    return g.op('Add', x, g.constant(params['bias'].reshape(-1, 1, 1)))

  x = g.op('Transpose', x, perm=[0, 3, 1, 2])
  x = g.op('Relu', norm(conv(x, params['conv_root']['kernel'], 2), params['gn_root']))
  x = g.op('MaxPool', x, kernel_shape=[3, 3], strides=[2, 2], auto_pad='SAME_UPPER')
  for stage, units in enumerate(blocks):
    for unit in range(units):
      p, stride = params[f'block{stage + 1}'][f'unit{unit + 1}'], 2 if stage and not unit else 1
      shortcut = (
        norm(conv(x, p['conv_proj']['kernel'], stride), p['gn_proj']) if 'conv_proj' in p else x
      )
      y = g.op('Relu', norm(conv(x, p['conv1']['kernel'], 1), p['gn1']))
      y = g.op('Relu', norm(conv(y, p['conv2']['kernel'], stride), p['gn2']))
      x = g.op('Relu', g.op('Add', shortcut, norm(conv(y, p['conv3']['kernel'], 1), p['gn3'])))
  return g.op('Transpose', x, perm=[0, 2, 3, 1])


def add_patch_embedding(g: OnnxGraph, x: str, model: PretrainedModel) -> str:
  """[b, H, W, c] -> tokens [b, n, d] with their positions, and the class token first."""
  params, config, (h, w) = model.params['embedding'], model.config, model.grid
  p, q, c, d = params['kernel'].shape
  x = g.op('Transpose', g.reshape(x, 0, h, p, w, q, c), perm=[0, 1, 3, 2, 4, 5])
  x = g.reshape(x, 0, h * w, p * q * c)
  x = g.norm(x, params['norm_before'], config.norm_eps) if config.patch_norm else x
  x = g.dense(x, params['kernel'].reshape(-1, d), params['bias'])
  x = g.norm(x, params['norm_after'], config.norm_eps) if config.patch_norm else x
  if config.position == 'sincos2d':
    x = g.op('Add', x, g.constant(np.asarray(sincos2d_embedding(model.grid, d))))
  if config.pool == 'token':
    x = g.op('Concat', repeat_tokens(g, x, model.params['cls']), x, axis=1)
  if config.position == 'learned':
    x = g.op('Add', x, g.constant(model.params['Transformer']['posembed_input']['pos_embedding']))
  return (
    g.op('Concat', x, repeat_tokens(g, x, model.params['registers']), axis=1)
    if config.registers
    else x
  )


def repeat_tokens(g: OnnxGraph, x: str, tokens: np.ndarray) -> str:
  """Tokens [1, n, d] for each of the b images that `x` has."""
  b = g.op('Shape', x, start=0, end=1)
  return g.op('Expand', g.constant(tokens), g.op('Concat', b, g.constant(tokens.shape[1:]), axis=0))


def add_encoder(g: OnnxGraph, x: str, model: PretrainedModel) -> str:
  """The blocks and the last norm, and no registers any more."""
  config, shape = model.config, model.model.shape
  stacked = flax.traverse_util.flatten_dict(model.params['Transformer']['encoderblock'])
  for i in range(shape.depth):
    p = flax.traverse_util.unflatten_dict({name: array[i] for name, array in stacked.items()})
    y = g.norm(x, p['LayerNorm_0'], config.norm_eps)
    x = g.op('Add', x, add_attention(g, y, y, p[ATTENTION_MODULE]))
    x = g.op(
      'Add',
      x,
      add_mlp(g, g.norm(x, p['LayerNorm_2'], config.norm_eps), p['MlpBlock_3'], config.gelu),
    )
  x = g.norm(x, model.params['Transformer']['encoder_norm'], config.norm_eps)
  if config.registers:
    x = g.op('Slice', x, g.constant([0]), g.constant([-config.registers]), g.constant([1]))
  return x


def add_attention(g: OnnxGraph, x: str, context: str, params: dict) -> str:
  """Of x [b, n, d] over context [b, m, d]."""
  d, heads, channels = params['query']['kernel'].shape

  def project(x: str, name: str, perm: list[int]) -> str:
    y = g.dense(x, params[name]['kernel'].reshape(d, -1), params[name]['bias'])
    return g.op('Transpose', g.reshape(y, 0, 0, heads, channels), perm=perm)

  q = g.op('Mul', project(x, 'query', [0, 2, 1, 3]), g.constant(np.float32([channels**-0.5])))
  k, v = project(context, 'key', [0, 2, 3, 1]), project(context, 'value', [0, 2, 1, 3])
  y = g.op('MatMul', g.op('Softmax', g.op('MatMul', q, k), axis=-1), v)
  y = g.reshape(g.op('Transpose', y, perm=[0, 2, 1, 3]), 0, 0, heads * channels)
  return g.dense(y, params['out']['kernel'].reshape(-1, d), params['out']['bias'])


def add_mlp(g: OnnxGraph, x: str, params: dict, gelu: str) -> str:
  """[b, n, d] -> [b, n, d]."""
  x = g.op(
    'Gelu', g.dense(x, **params['Dense_0']), approximate={'tanh': 'tanh', 'erf': 'none'}[gelu]
  )
  return g.dense(x, **params['Dense_1'])


def add_pooling(g: OnnxGraph, x: str, model: PretrainedModel) -> str:
  """[b, n, d] -> [b, d]."""
  if model.config.pool == 'token':
    return g.op('Gather', x, g.constant(0), axis=1)
  if model.config.pool == 'gap':
    return g.op('ReduceMean', x, g.constant([1]), keepdims=0)
  p = model.params['MAPHead_0']
  x = add_attention(g, repeat_tokens(g, x, p['probe']), x, p['MultiHeadDotProductAttention_0'])
  y = g.norm(x, p['LayerNorm_0'], model.config.norm_eps)
  x = g.op('Add', x, add_mlp(g, y, p['MlpBlock_0'], model.config.gelu))
  return g.op('Squeeze', x, g.constant([1]))
