"""Names of the arrays of the Vision Transformers in transformers.

ViT, DINOv2 and DINOv3 have a module of their own each; DeiT and BEiT share the names of ViT, and
the image towers of CLIP and SigLIP those of each other.
"""

import dataclasses
from collections.abc import Collection, Mapping

from vit_jax.pretrained.arrays import ATTENTION_MODULE, POSITION_EMBEDDING
from vit_jax.pretrained.torch_layout import TorchLayout

MAP_ATTENTION = 'MAPHead_0/MultiHeadDotProductAttention_0'
SINGLE_ARRAYS = {
  'embeddings.cls_token': 'cls',
  'embeddings.distillation_token': 'dist',
  'embeddings.position_embeddings': POSITION_EMBEDDING,
  'embeddings.register_tokens': 'registers',
}
TOP_LAYERS = {
  'embeddings.patch_embeddings.projection': ('embedding', 'conv'),
  'layernorm': ('Transformer/encoder_norm', 'norm'),
  'pooler.dense': ('pre_logits', 'dense'),
  'pooler.layernorm': ('fc_norm', 'norm'),
  'distillation_classifier': ('head_dist', 'dense'),
  'cls_classifier': ('head', 'dense'),
  'classifier': ('head', 'dense'),
}
ATTENTION_LAYERS = {
  'attention.attention.query': (f'{ATTENTION_MODULE}/query', 'in'),
  'attention.attention.key': (f'{ATTENTION_MODULE}/key', 'in'),
  'attention.attention.value': (f'{ATTENTION_MODULE}/value', 'in'),
  'attention.output.dense': (f'{ATTENTION_MODULE}/out', 'out'),
}
RELATIVE_BIAS = 'attention.attention.relative_position_bias'
RELATIVE_TABLE_NAME = 'relative_position_bias_table'
SHARED_TABLE = f'encoder.relative_position_bias.{RELATIVE_TABLE_NAME}'
TABLE_OF_BLOCK = f'encoder.layer.{{}}.{RELATIVE_BIAS}.{RELATIVE_TABLE_NAME}'
LAYER_SCALES = {'layer_scale1.lambda1': 'attention_scale', 'layer_scale2.lambda1': 'mlp_scale'}
SWIGLU_LAYERS = {
  'mlp.gate_proj': ('MlpBlock_3/Gate', 'dense'),
  'mlp.up_proj': ('MlpBlock_3/Dense_0', 'dense'),
  'mlp.down_proj': ('MlpBlock_3/Dense_1', 'dense'),
}
VIT_LAYOUT = TorchLayout(
  SINGLE_ARRAYS,
  TOP_LAYERS,
  'encoder.layer.{}.',
  ATTENTION_LAYERS
  | {
    'layernorm_before': ('LayerNorm_0', 'norm'),
    'layernorm_after': ('LayerNorm_2', 'norm'),
    'intermediate.dense': ('MlpBlock_3/Dense_0', 'dense'),
    'output.dense': ('MlpBlock_3/Dense_1', 'dense'),
  },
  # BEiT alone has these.
  {
    'lambda_1': 'attention_scale',
    'lambda_2': 'mlp_scale',
    f'{RELATIVE_BIAS}.{RELATIVE_TABLE_NAME}': f'{ATTENTION_MODULE}/relative/table',
  },
)
DINOV2_LAYOUT = TorchLayout(
  SINGLE_ARRAYS,
  TOP_LAYERS,
  'encoder.layer.{}.',
  ATTENTION_LAYERS
  | SWIGLU_LAYERS
  | {
    'norm1': ('LayerNorm_0', 'norm'),
    'norm2': ('LayerNorm_2', 'norm'),
    'mlp.weights_out': ('MlpBlock_3/Dense_1', 'dense'),
    'mlp.fc1': ('MlpBlock_3/Dense_0', 'dense'),
    'mlp.fc2': ('MlpBlock_3/Dense_1', 'dense'),
  },
  LAYER_SCALES,
)
DINOV3_LAYOUT = TorchLayout(
  SINGLE_ARRAYS,
  {
    'embeddings.patch_embeddings': ('embedding', 'conv'),
    'norm': ('Transformer/encoder_norm', 'norm'),
  },
  'layer.{}.',
  {
    'norm1': ('LayerNorm_0', 'norm'),
    'attention.q_proj': (f'{ATTENTION_MODULE}/query', 'in'),
    'attention.k_proj': (f'{ATTENTION_MODULE}/key', 'in'),
    'attention.v_proj': (f'{ATTENTION_MODULE}/value', 'in'),
    'attention.o_proj': (f'{ATTENTION_MODULE}/out', 'out'),
    'norm2': ('LayerNorm_2', 'norm'),
  }
  | SWIGLU_LAYERS,
  LAYER_SCALES,
)
TOWER_LAYOUT = TorchLayout(
  {
    'embeddings.class_embedding': 'cls',
    'embeddings.position_embedding.weight': POSITION_EMBEDDING,
    'head.probe': 'MAPHead_0/probe',
  },
  {
    'embeddings.patch_embedding': ('embedding', 'conv'),
    'pre_layrnorm': ('Transformer/pre_norm', 'norm'),
    'post_layernorm': ('Transformer/encoder_norm', 'norm'),
    'visual_projection': ('head', 'dense'),
    'classifier': ('head', 'dense'),
    'head.attention.q_proj': (f'{MAP_ATTENTION}/query', 'in'),
    'head.attention.k_proj': (f'{MAP_ATTENTION}/key', 'in'),
    'head.attention.v_proj': (f'{MAP_ATTENTION}/value', 'in'),
    'head.attention.out_proj': (f'{MAP_ATTENTION}/out', 'out'),
    'head.layernorm': ('MAPHead_0/LayerNorm_0', 'norm'),
    'head.mlp.fc1': ('MAPHead_0/MlpBlock_0/Dense_0', 'dense'),
    'head.mlp.fc2': ('MAPHead_0/MlpBlock_0/Dense_1', 'dense'),
  },
  'encoder.layers.{}.',
  {
    'layer_norm1': ('LayerNorm_0', 'norm'),
    'self_attn.q_proj': (f'{ATTENTION_MODULE}/query', 'in'),
    'self_attn.k_proj': (f'{ATTENTION_MODULE}/key', 'in'),
    'self_attn.v_proj': (f'{ATTENTION_MODULE}/value', 'in'),
    'self_attn.out_proj': (f'{ATTENTION_MODULE}/out', 'out'),
    'layer_norm2': ('LayerNorm_2', 'norm'),
    'mlp.fc1': ('MlpBlock_3/Dense_0', 'dense'),
    'mlp.fc2': ('MlpBlock_3/Dense_1', 'dense'),
  },
  {},
)


@dataclasses.dataclass(frozen=True, slots=True)
class HuggingFaceFamily:
  """Models that share the names of their arrays.

  Attributes:
    layout: Names of the arrays.
    patch_weight: An array that only these models have.
    prefixes: Possible prefixes of the backbone's arrays.
    hidden_act: Activation of a config.json that states none.
    norm_eps: Epsilon of a config.json that states none.
    rope: Whether positions are rotary.
    fused: Layers that are stored as one.
    classifier: Features that a classifier reads, if they are not those of our head.
  """

  layout: TorchLayout
  patch_weight: str
  prefixes: tuple[str, ...]
  hidden_act: str
  norm_eps: float
  rope: bool = False
  fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  classifier: str = ''


PLAIN_PATCH_WEIGHT = 'embeddings.patch_embeddings.projection.weight'
TOWER_PATCH_WEIGHT = 'embeddings.patch_embedding.weight'
TOWER_PREFIXES = ('', 'vision_model.')
TOWER_CLASSIFIER = 'the mean of the patches without the last layers of the image tower'
VIT = HuggingFaceFamily(
  VIT_LAYOUT, PLAIN_PATCH_WEIGHT, ('', 'vit.', 'deit.', 'beit.', 'data2vec_vision.'), 'gelu',
  norm_eps=1e-12,
)  # fmt: skip
DINOV2 = HuggingFaceFamily(
  DINOV2_LAYOUT, PLAIN_PATCH_WEIGHT, ('', 'dinov2.', 'dinov2_with_registers.'), 'gelu',
  norm_eps=1e-6,
  fused={'mlp.weights_in': ('mlp.gate_proj', 'mlp.up_proj')},
  classifier='the class token and the mean of the patches side by side',
)  # fmt: skip
DINOV3 = HuggingFaceFamily(
  DINOV3_LAYOUT, 'embeddings.patch_embeddings.weight', ('',), 'gelu', norm_eps=1e-5, rope=True
)
CLIP = HuggingFaceFamily(
  TOWER_LAYOUT, TOWER_PATCH_WEIGHT, TOWER_PREFIXES, 'quick_gelu', norm_eps=1e-5,
  classifier=TOWER_CLASSIFIER,
)  # fmt: skip
SIGLIP = HuggingFaceFamily(
  TOWER_LAYOUT, TOWER_PATCH_WEIGHT, TOWER_PREFIXES, 'gelu_pytorch_tanh', norm_eps=1e-6,
  fused={
    'head.attention.in_proj': tuple(f'head.attention.{name}_proj' for name in ('q', 'k', 'v'))
  },
  classifier=TOWER_CLASSIFIER,
)  # fmt: skip
# An array that only one of two families with the same patch kernel has.
DISTINCTIVE_ARRAYS = {'.layer_scale1.': (DINOV2, VIT), 'pre_layrnorm.': (CLIP, SIGLIP)}


def find_family(names: Collection[str]) -> tuple[HuggingFaceFamily, str] | None:
  """Return the family of a model and the prefix of its backbone; None if it is of none."""
  for mark, (marked, unmarked) in (*DISTINCTIVE_ARRAYS.items(), ('', (DINOV3, DINOV3))):
    for prefix in (*marked.prefixes, *unmarked.prefixes):
      if prefix + marked.patch_weight in names:
        return (marked if any(mark in name for name in names) else unmarked), prefix
  return None
