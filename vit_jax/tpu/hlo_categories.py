"""Categories of the instructions of a compiled train step: the parts of the model.

The `op_name` of an instruction is a path of modules that ends with a JAX primitive, such as
'jit(train_step)/shard_map/transpose(jvp(VisionTransformer))/…/encoderblock/MlpBlock_3/mul'.
"""

import re

PROJECTIONS = 'projections'
ATTENTION_FORWARD = 'attention, forward'
ATTENTION_BACKWARD = 'attention, backward'
LAYER_NORM = 'LayerNorm'
GELU = 'GELU'
RESIDUALS = 'residuals'
PATCH_EMBEDDING = 'patch embedding'
HEAD_AND_LOSS = 'head and loss'
OPTIMIZER = 'optimizer'
COLLECTIVES = 'collectives'
COPIES = 'copies and layout changes'
OTHER = 'other'
CATEGORIES = (
  PROJECTIONS, ATTENTION_FORWARD, ATTENTION_BACKWARD, LAYER_NORM, GELU, RESIDUALS,
  PATCH_EMBEDDING, HEAD_AND_LOSS, OPTIMIZER, COLLECTIVES, COPIES, OTHER,
)  # fmt: skip

# Attention is the kernel or, without it, all that XLA computes between the projections: names of
# JAX's function, of einsum and of the softmax.
ATTENTION = r'attention_(?:forward|backward)|dot_product_attention|softmax|->|/exp|/div|/reduce_max'
NORM = r'(?:LayerNorm|BatchNorm|RMSNorm|[a-z]+_norm|norm_[a-z]+)(?:_\d+)?(?:/|$)'
# (pattern, category) of the path after a block's name; the first that matches.
IN_BLOCK = (
  (NORM, LAYER_NORM),
  (rf'Attention.*(?:{ATTENTION})', ATTENTION_FORWARD),
  (r'Attention|MlpBlock[^/]*/(?:Dense|Gate)', PROJECTIONS),
  (r'MlpBlock', GELU),
  (r'', RESIDUALS),
)
# The same of a path outside of the blocks.
ELSEWHERE = (
  (r'/psum|reduce_scatter|all_gather|all_to_all|ppermute', COLLECTIVES),
  (r'MAPHead|head/|head$|pre_logits|\.pool|log_softmax|_one_hot|jvp\(\)|loss', HEAD_AND_LOSS),
  (NORM, LAYER_NORM),
  (r'\.embed|\.encode|/Transformer', PATCH_EMBEDDING),
  (r'\(train_step\)/(?:cond/.+|[a-z_]+$)', OPTIMIZER),
  (r'', OTHER),
)
BLOCK = re.compile(r'(?:^|.*/)encoderblock/')


def categorize(op_name: str) -> str | None:
  """Return the category of a path, or None if it is not a path: '' or a name of the compiler."""
  if '/' not in op_name:
    return None
  block = BLOCK.match(op_name)
  rules, path = (IN_BLOCK, op_name[block.end() :]) if block else (ELSEWHERE, op_name)
  category = next(category for pattern, category in rules if re.search(pattern, path))
  if category == ATTENTION_FORWARD and ('transpose(' in op_name or 'backward' in path):
    return ATTENTION_BACKWARD
  return category
