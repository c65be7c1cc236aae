"""Paths of modules, as the compiler's text has them, and their categories."""

import pytest

from vit_jax.tpu.hlo_categories import CATEGORIES, categorize

STEP = 'jit(train_step)/shard_map'
FORWARD = f'{STEP}/jvp(VisionTransformer)'
BACKWARD = f'{STEP}/transpose(jvp(VisionTransformer))'
BLOCK = 'VisionTransformer.encode/Transformer/while/body/closed_call/checkpoint/encoderblock'
ATTENTION = f'{BLOCK}/MultiHeadDotProductAttention_1'
PATHS = {
  f'{FORWARD}/{ATTENTION}/dot_general': 'projections',
  f'{FORWARD}/{ATTENTION}/value/convert_element_type': 'projections',
  f'{BACKWARD}/{BLOCK}/MlpBlock_3/Dense_1/dot_general': 'projections',
  f'{FORWARD}/{BLOCK}/MlpBlock_3/Gate/dot_general': 'projections',
  f'{FORWARD}/{ATTENTION}/attention_forward/pallas_call': 'attention, forward',
  f'{BACKWARD}/{ATTENTION}/attention_backward/pallas_call': 'attention, backward',
  f'{FORWARD}/{ATTENTION}/jit(_dot_product_attention)/exp': 'attention, forward',
  f'{BACKWARD}/{ATTENTION}/BNTS,BSNH->BTNH/dot_general': 'attention, backward',
  f'{FORWARD}/{ATTENTION}/query_norm/mul': 'LayerNorm',
  f'{BACKWARD}/{BLOCK}/LayerNorm_0/reduce_sum': 'LayerNorm',
  f'{FORWARD}/VisionTransformer.encode/Transformer/encoder_norm/sub': 'LayerNorm',
  f'{BACKWARD}/{BLOCK}/MlpBlock_3/jit(gelu)/tanh': 'GELU',
  f'{BACKWARD}/{BLOCK}/MlpBlock_3/mul': 'GELU',
  f'{FORWARD}/{BLOCK}/add': 'residuals',
  f'{BACKWARD}/{BLOCK}/add_any': 'residuals',
  f'{FORWARD}/VisionTransformer.embed/embedding/dot_general': 'patch embedding',
  f'{FORWARD}/VisionTransformer.encode/Transformer/posembed_input/add': 'patch embedding',
  f'{FORWARD}/VisionTransformer.pool/slice': 'head and loss',
  f'{BACKWARD}/head/dot_general': 'head and loss',
  f'{STEP}/transpose(jvp(jit(log_softmax)))/reduce_sum': 'head and loss',
  f'{STEP}/jvp()/reduce_sum': 'head and loss',
  'jit(train_step)/jit(_one_hot)/eq': 'head and loss',
  'jit(train_step)/reduce_sum': 'optimizer',
  'jit(train_step)/cond/branch_0_fun/mul': 'optimizer',
  f'{STEP}/psum': 'collectives',
  'jit(train_step)/jit(_uniform)/mul': 'other',
  'broadcast.7': None,
  '': None,
}


@pytest.mark.parametrize(('path', 'category'), PATHS.items())
def test_a_path_belongs_to_the_part_of_the_model_that_it_names(path, category):
  assert categorize(path) == category
  assert category in (*CATEGORIES, None)
