"""Build an ONNX graph of a Vision Transformer with the helpers of the `onnx` package.

The graph is written by hand, because no converter without TensorFlow covers our models. jax2onnx
0.17 cannot trace Flax's `nn.scan`, produces a max pooling for hybrids that onnxruntime rejects, and
requires an older Orbax than ours.

In float16, products and the activations between them are float16. What adds up or divides is
float32: the tokens to which blocks add, norms, softmax, and the product of the head.

Shapes: b batch, n tokens, d width, h heads, c channels of a head, k classes.
"""

import functools
import math
from collections.abc import Sequence

import flax.traverse_util
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.positions import relative_table_index, rotary_positions, sincos2d_embedding
from vit_jax.models.resnet import RESNET_V1
from vit_jax.models.rope import rotation_tables
from vit_jax.models.variants import NORM_GROUPS
from vit_jax.pretrained.arrays import ATTENTION_MODULE
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.pretrained.onnx_metadata import onnx_metadata

# Opset -> the IR version of its release. 17 is the first opset with LayerNormalization, and 20 the
# first with Gelu.
ONNX_OPSETS = {17: 8, 20: 9}


class OnnxGraph:
  """A growing list of nodes and constants. Values are identified by their names.

  With `float16`, weights are float16, and so is every value that `as_half` returns or that depends
  on such a value, until `as_single`. Otherwise both return what they are given.
  """

  def __init__(self, opset: int, *, float16: bool):
    self.opset, self.float16 = opset, float16
    self.nodes, self.constants = [], []
    self._halves = set()  # The names of float16 values.

  def add_node(self, kind: str, *inputs: str, **attributes) -> str:
    """Add a node, and return the name of its output."""
    name = f'{kind}_{len(self.nodes)}'
    self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
    if kind not in ('Cast', 'Shape') and not self._halves.isdisjoint(inputs):
      self._halves.add(name)
    return name

  def add_constant(self, value: np.ndarray | Sequence[int] | int) -> str:
    """Add an array as float32, or integers as int64, and return its name."""
    is_array = isinstance(value, np.ndarray)
    return self._add_array(np.asarray(value, np.float32 if is_array else np.int64))

  def add_weight(self, value: np.ndarray) -> str:
    """Add an array of parameters, float16 or float32, and return its name.

    Raises UserError if float16 cannot represent it.
    """
    if not self.float16:
      return self.add_constant(value)
    if (largest := np.abs(value).max()) > np.finfo(np.float16).max:
      raise UserError(f'float16 cannot represent a weight of {largest:.3g}: export in float32')
    self._halves.add(name := self._add_array(np.asarray(value, np.float16)))
    return name

  def add_scalar(self, value: float, x: str) -> str:
    """Add a number of the type of the value `x`, and return its name."""
    array = np.array([value], np.float32)
    return self.add_weight(array) if x in self._halves else self.add_constant(array)

  def as_half(self, x: str) -> str:
    """Return a float32 value as float16."""
    if not self.float16 or x in self._halves:
      return x
    self._halves.add(name := self.add_node('Cast', x, to=TensorProto.FLOAT16))
    return name

  def as_single(self, x: str) -> str:
    """Return a float16 value as float32."""
    return self.add_node('Cast', x, to=TensorProto.FLOAT) if x in self._halves else x

  def add_reshape(self, x: str, *shape: int) -> str:
    """Add a reshape. 0 keeps the size of an axis, and -1 infers it."""
    return self.add_node('Reshape', x, self.add_constant(shape))

  def add_dense(self, x: str, kernel: np.ndarray, bias: np.ndarray | None = None) -> str:
    """Add a dense layer [..., i] -> [..., o] with a kernel [i, o]. The result is float16 if on."""
    y = self.add_node('MatMul', self.as_half(x), self.add_weight(kernel))
    if bias is None:
      return y
    return self.add_node('Add', y, self.add_weight(bias.reshape(-1)))

  def add_mean(self, x: str, axis: int, *, keepdims: int) -> str:
    """Add the mean over an axis."""
    if self.opset < 18:  # The axes became an input.
      return self.add_node('ReduceMean', x, axes=[axis], keepdims=keepdims)
    return self.add_node('ReduceMean', x, self.add_constant([axis]), keepdims=keepdims)

  def add_layer_norm(self, x: str, params: dict, eps: float) -> str:
    """Add a norm over the last axis of a float32 value: RMSNorm, if there is no bias."""
    scale = self.add_constant(params['scale'])
    if 'bias' not in params:
      square = self.add_mean(self.add_node('Mul', x, x), -1, keepdims=1)
      deviation = self.add_node('Sqrt', self.add_node('Add', square, self.add_scalar(eps, x)))
      return self.add_node('Mul', self.add_node('Div', x, deviation), scale)
    bias = self.add_constant(params['bias'])
    return self.add_node('LayerNormalization', x, scale, bias, axis=-1, epsilon=eps)

  def _add_array(self, array: np.ndarray) -> str:
    name = f'constant_{len(self.constants)}'
    self.constants.append(numpy_helper.from_array(np.asarray(array, order='C'), name))
    return name


def to_onnx(model: PretrainedModel, *, opset: int, float16: bool) -> onnx.ModelProto:
  """Return a graph from 'images' uint8 [b, h, w, c] to 'logits' float32 [b, k].

  Without a head, the output is 'features' [b, d]. The batch size b is free. The metadata have what
  `onnx_metadata` says.
  """
  g, config, params = OnnxGraph(opset, float16=float16), model.config, model.params
  x = g.add_node('Cast', 'images', to=TensorProto.FLOAT)
  x = g.add_node('Sub', x, g.add_constant(np.array(config.mean, np.float32)))
  x = g.add_node('Div', x, g.add_constant(np.array(config.scale, np.float32)))
  if model.model.shape.backbone:
    x = add_resnet_stem(g, x, params, model.model.shape.backbone.blocks_per_stage)
  x = add_encoder(g, add_patch_embedding(g, x, model), model)
  x = add_pooling(g, x, model)
  if config.hidden_head:
    x = g.add_node('Tanh', g.as_single(g.add_dense(x, **params['pre_logits'])))
  if model.classes:  # float16 has steps of 1/128 at the initial bias of a sigmoid's head, -10.
    kernel = g.as_single(g.add_weight(params['head']['kernel']))
    x = g.add_node('Add', g.add_node('MatMul', x, kernel), g.add_constant(params['head']['bias']))
  output = 'logits' if model.classes else 'features'
  g.nodes.append(helper.make_node('Identity', [x], [output]))
  features = model.model.shape.width * (1 + config.distillation_token)
  shape, width = (*model.size, config.channels), model.classes or features
  proto = make_model_proto(g, shape, output, width)
  helper.set_model_props(proto, onnx_metadata(model))
  return proto


def make_model_proto(
  g: OnnxGraph, shape: tuple[int, int, int], output: str, width: int
) -> onnx.ModelProto:
  """Declare the input images [b, *shape] and the output [b, width]."""
  inputs = [helper.make_tensor_value_info('images', TensorProto.UINT8, ['b', *shape])]
  outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ['b', width])]
  graph = helper.make_graph(g.nodes, 'vision_transformer', inputs, outputs, g.constants)
  opsets = [helper.make_opsetid('', g.opset)]
  proto = helper.make_model(graph, opset_imports=opsets, producer_name='vit_jax')
  proto.ir_version = ONNX_OPSETS[g.opset]
  return proto


def add_conv(g: OnnxGraph, x: str, kernel: np.ndarray, stride: int) -> str:
  """Add a weight-standardized convolution of x [b, c, h, w] with a kernel [p, q, i, o].

  The result is float32.
  """
  kernel = kernel - kernel.mean(axis=(0, 1, 2))
  kernel = kernel / (kernel.std(axis=(0, 1, 2)) + RESNET_V1.std_eps)
  kernel = kernel.transpose(3, 2, 0, 1)
  attributes = {'kernel_shape': list(kernel.shape[2:]), 'strides': [stride, stride]}
  weight = g.add_weight(kernel)
  y = g.add_node('Conv', g.as_half(x), weight, auto_pad='SAME_UPPER', **attributes)
  return g.as_single(y)


def add_group_norm(g: OnnxGraph, x: str, params: dict) -> str:
  """Add a group norm of x [b, c, h, w], as an instance norm whose channels are the groups."""
  ones = g.add_constant(np.ones(NORM_GROUPS, np.float32))
  zeros = g.add_constant(np.zeros(NORM_GROUPS, np.float32))
  groups = g.add_reshape(x, 0, NORM_GROUPS, -1)
  groups = g.add_node('InstanceNormalization', groups, ones, zeros, epsilon=RESNET_V1.norm_eps)
  x = g.add_node('Reshape', groups, g.add_node('Shape', x))
  x = g.add_node('Mul', x, g.add_constant(params['scale'].reshape(-1, 1, 1)))
  return g.add_node('Add', x, g.add_constant(params['bias'].reshape(-1, 1, 1)))


def add_resnet_stem(g: OnnxGraph, x: str, params: dict, blocks: tuple[int, ...]) -> str:
  """Add a hybrid's ResNet, from [b, h, w, c] to [b, h, w, c] at its stride.

  `blocks` are the units of each stage. In between, channels are the second axis.
  """
  x = g.add_node('Transpose', x, perm=[0, 3, 1, 2])
  x = add_group_norm(g, add_conv(g, x, params['conv_root']['kernel'], 2), params['gn_root'])
  x = g.add_node('Relu', x)
  x = g.add_node('MaxPool', x, kernel_shape=[3, 3], strides=[2, 2], auto_pad='SAME_UPPER')
  for stage, units in enumerate(blocks):
    for unit in range(units):
      stride = 2 if stage and not unit else 1
      x = add_resnet_unit(g, x, params[f'block{stage + 1}'][f'unit{unit + 1}'], stride)
  return g.add_node('Transpose', x, perm=[0, 2, 3, 1])


def add_resnet_unit(g: OnnxGraph, x: str, params: dict, stride: int) -> str:
  """Add a bottleneck unit: three convolutions and a shortcut."""
  shortcut = x
  if 'conv_proj' in params:
    shortcut = add_conv(g, x, params['conv_proj']['kernel'], stride)
    shortcut = add_group_norm(g, shortcut, params['gn_proj'])
  y = add_group_norm(g, add_conv(g, x, params['conv1']['kernel'], 1), params['gn1'])
  y = g.add_node('Relu', y)
  y = add_group_norm(g, add_conv(g, y, params['conv2']['kernel'], stride), params['gn2'])
  y = g.add_node('Relu', y)
  y = add_group_norm(g, add_conv(g, y, params['conv3']['kernel'], 1), params['gn3'])
  return g.add_node('Relu', g.add_node('Add', shortcut, y))


def add_patch_embedding(g: OnnxGraph, x: str, model: PretrainedModel) -> str:
  """Add the patch embedding, from images [b, H, W, c] to tokens [b, n, d].

  Position embeddings are added. The class and distillation tokens are first, registers are last.
  """
  params, config, (h, w) = model.params['embedding'], model.config, model.grid
  p, q, c, d = params['kernel'].shape
  x = g.add_node('Transpose', g.add_reshape(x, 0, h, p, w, q, c), perm=[0, 1, 3, 2, 4, 5])
  x = g.add_reshape(x, 0, h * w, p * q * c)
  x = g.add_layer_norm(x, params['norm_before'], config.norm_eps) if config.patch_norm else x
  x = g.as_single(g.add_dense(x, params['kernel'].reshape(-1, d), params.get('bias')))
  x = g.add_layer_norm(x, params['norm_after'], config.norm_eps) if config.patch_norm else x
  if config.position == 'sincos2d':
    x = g.add_node('Add', x, g.add_constant(np.asarray(sincos2d_embedding(model.grid, d))))
  for name in ('dist', 'cls'):
    if name in model.params:
      x = g.add_node('Concat', repeat_tokens(g, x, model.params[name]), x, axis=1)
  if config.position in ('learned', 'learned+rope'):
    table = model.params['Transformer']['posembed_input']['pos_embedding']
    x = g.add_node('Add', x, g.add_constant(table))
  if config.registers:
    x = g.add_node('Concat', x, repeat_tokens(g, x, model.params['registers']), axis=1)
  return x


def repeat_tokens(g: OnnxGraph, x: str, tokens: np.ndarray) -> str:
  """Repeat tokens [1, n, d] for each of the b images of `x`."""
  b = g.add_node('Shape', x, start=0, end=1)
  shape = g.add_node('Concat', b, g.add_constant(tokens.shape[1:]), axis=0)
  return g.add_node('Expand', g.add_constant(tokens), shape)


def add_encoder(g: OnnxGraph, x: str, model: PretrainedModel) -> str:
  """Add the blocks and the last norm, and remove the registers."""
  config, shape = model.config, model.model.shape
  rope = None
  if rotary := rotary_positions(config, model.grid):
    n = math.prod(model.grid) + config.prefix_tokens + config.registers
    rope = rotation_tables(rotary, n, shape.width // shape.heads)
  if config.pre_norm:
    x = g.add_layer_norm(x, model.params['Transformer']['pre_norm'], config.norm_eps)
  stacked = flax.traverse_util.flatten_dict(model.params['Transformer']['encoderblock'])
  for i in range(shape.depth):
    p = flax.traverse_util.unflatten_dict({name: array[i] for name, array in stacked.items()})
    y = g.add_layer_norm(x, p['LayerNorm_0'], config.norm_eps)
    attend = functools.partial(add_attention, rope=rope, score_bias=add_score_bias(g, p, model))
    y = attend(g, y, y, p[ATTENTION_MODULE], norm_eps=config.norm_eps)
    x = g.add_node('Add', x, add_layer_scale(g, y, p, 'attention_scale'))
    y = g.add_layer_norm(x, p['LayerNorm_2'], config.norm_eps)
    y = add_mlp(g, y, p['MlpBlock_3'], config)
    x = g.add_node('Add', x, add_layer_scale(g, y, p, 'mlp_scale'))
  if not config.fc_norm:
    x = g.add_layer_norm(x, model.params['Transformer']['encoder_norm'], config.norm_eps)
  if config.registers:
    start, end, axis = (g.add_constant([value]) for value in (0, -config.registers, 1))
    x = g.add_node('Slice', x, start, end, axis)
  return x


def add_score_bias(g: OnnxGraph, params: dict, model: PretrainedModel) -> str | None:
  """Add the bias [1, h, n, n] of relative positions, if the block has one."""
  if model.config.position != 'relative2d':
    return None
  table = params[ATTENTION_MODULE]['relative']['table']
  index = relative_table_index(model.grid, class_token=model.config.has_class_token)
  return g.add_constant(np.moveaxis(table[index], -1, 0)[None])


def add_layer_scale(g: OnnxGraph, x: str, params: dict, name: str) -> str:
  """Add the factors of LayerScale, if the block has them."""
  return g.add_node('Mul', x, g.add_constant(params[name])) if name in params else x


def add_attention(
  g: OnnxGraph,
  x: str,
  context: str,
  params: dict,
  *,
  norm_eps: float,
  rope: tuple[np.ndarray, np.ndarray] | None = None,
  score_bias: str | None = None,
) -> str:
  """Add multi-head attention of x [b, n, d] over context [b, m, d], all float32.

  `norm_eps` is the epsilon of norms of queries and keys. `rope` is the cosines and sines of their
  rotation. `score_bias` is added to the scores.
  """
  d, heads, channels = params['query']['kernel'].shape
  x, context = (g.as_half(x), g.as_half(context)) if x != context else (g.as_half(x),) * 2

  def project(x: str, name: str, perm: list[int]) -> str:
    y = g.add_dense(x, params[name]['kernel'].reshape(d, -1), params[name].get('bias'))
    y = g.add_reshape(y, 0, 0, heads, channels)
    if f'{name}_norm' in params:
      y = g.add_layer_norm(g.as_single(y), params[f'{name}_norm'], norm_eps)
    if rope and name != 'value':
      y = add_rotation(g, g.as_single(y), rope)
    y = g.as_half(y)
    return g.add_node('Transpose', y, perm=perm)

  q = project(x, 'query', [0, 2, 1, 3])
  q = g.add_node('Mul', q, g.add_scalar(channels**-0.5, q))
  k, v = project(context, 'key', [0, 2, 3, 1]), project(context, 'value', [0, 2, 1, 3])
  scores = g.as_single(g.add_node('MatMul', q, k))
  scores = g.add_node('Add', scores, score_bias) if score_bias else scores
  weights = g.add_node('Softmax', scores, axis=-1)
  y = g.add_node('MatMul', g.as_half(weights), v)
  y = g.add_reshape(g.add_node('Transpose', y, perm=[0, 2, 1, 3]), 0, 0, heads * channels)
  return g.as_single(g.add_dense(y, params['out']['kernel'].reshape(-1, d), params['out']['bias']))


def add_rotation(g: OnnxGraph, x: str, rope: tuple[np.ndarray, np.ndarray]) -> str:
  """Add the rotation of queries or keys [b, n, h, c] with cosines and sines [n, 1, c]."""
  cos, sin = (g.add_constant(table) for table in rope)
  half, end, axis = (g.add_constant([v]) for v in (rope[0].shape[-1] // 2, 2**31, 3))
  left = g.add_node('Slice', x, g.add_constant([0]), half, axis)
  right = g.add_node('Slice', x, half, end, axis)
  turned = g.add_node('Concat', g.add_node('Neg', right), left, axis=3)
  return g.add_node('Add', g.add_node('Mul', x, cos), g.add_node('Mul', turned, sin))


def add_mlp(g: OnnxGraph, x: str, params: dict, config: ModelConfig) -> str:
  """Add an MLP block, from [b, n, d] to [b, n, d], both float32."""
  x = g.as_half(x)
  y = g.add_dense(x, **params['Dense_0'])
  if 'Gate' in params:
    gate = g.add_dense(x, **params['Gate'])
    y = g.add_node('Mul', g.add_node('Mul', gate, g.add_node('Sigmoid', gate)), y)
  else:
    y = add_gelu(g, y, config.gelu)
  if 'hidden_norm' in params:
    y = g.add_layer_norm(g.as_single(y), params['hidden_norm'], config.norm_eps)
  return g.as_single(g.add_dense(y, **params['Dense_1']))


def add_gelu(g: OnnxGraph, x: str, kind: str) -> str:
  """Add GELU: 'tanh', 'erf' or 'quick'. Without Gelu in the opset it has a form that is fused.

  In float16, x² of the approximation may be infinite. tanh is then ±1, which is its limit.
  """
  if kind == 'quick':
    return g.add_node('Mul', x, g.add_node('Sigmoid', g.add_node('Mul', x, g.add_scalar(1.702, x))))
  if g.opset >= 20:
    return g.add_node('Gelu', x, approximate={'tanh': 'tanh', 'erf': 'none'}[kind])
  scalar = lambda value: g.add_scalar(value, x)
  if kind == 'erf':  # x (1 + erf(x / √2)) / 2
    y = g.add_node('Erf', g.add_node('Div', x, scalar(math.sqrt(2))))
    y = g.add_node('Mul', x, g.add_node('Add', y, scalar(1)))
    return g.add_node('Mul', y, scalar(0.5))
  square = g.add_node('Mul', g.add_node('Mul', x, scalar(0.044715)), x)
  y = g.add_node('Mul', x, scalar(math.sqrt(2 / math.pi)))
  y = g.add_node('Mul', y, g.add_node('Add', square, scalar(1)))
  y = g.add_node('Add', g.add_node('Tanh', y), scalar(1))
  return g.add_node('Mul', g.add_node('Mul', x, scalar(0.5)), y)


def add_pooling(g: OnnxGraph, x: str, model: PretrainedModel) -> str:
  """Add the pooling, from [b, n, d] to [b, d]."""
  if model.config.distillation_token:
    start, end, axis = (g.add_constant([value]) for value in (0, 2, 1))
    return g.add_reshape(g.add_node('Slice', x, start, end, axis), 0, 2 * model.model.shape.width)
  if model.config.pool == 'token':
    return g.add_node('Gather', x, g.add_constant(0), axis=1)
  if model.config.pool == 'gap':
    if model.config.class_token:
      start, end, axis = (g.add_constant([value]) for value in (1, 2**31, 1))
      x = g.add_node('Slice', x, start, end, axis)
    x = g.add_mean(x, 1, keepdims=0)
    fc_norm = model.params.get('fc_norm')
    return g.add_layer_norm(x, fc_norm, model.config.norm_eps) if fc_norm else x
  p = model.params['MAPHead_0']
  probe, attention = repeat_tokens(g, x, p['probe']), p['MultiHeadDotProductAttention_0']
  x = add_attention(g, probe, x, attention, norm_eps=model.config.norm_eps)
  y = g.add_layer_norm(x, p['LayerNorm_0'], model.config.norm_eps)
  x = g.add_node('Add', x, add_mlp(g, y, p['MlpBlock_0'], model.config))
  return g.add_node('Squeeze', x, g.add_constant([1]))
