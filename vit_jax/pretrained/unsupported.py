"""Recognize arrays of Vision Transformers whose function our model does not have."""

import re
from collections.abc import Iterable

from vit_jax.errors import UserError

# Names in the files of timm, Hugging Face and the models' authors -> what has such arrays.
UNSUPPORTED_ARRAYS = {
  r'dist_token|(.*\.)?distillation_token|head_dist\..*': 'a distilled DeiT with two heads',
  r'(.*\.)?relative_position_(bias|bias_table|index)(\..*)?|(.*\.)?rel_pos(_.*)?(\..*)?': (
    'a model with relative positions, as in BEiT'
  ),
  r'(.*\.)?(attn|mlp)\.norm\..*': 'a model with norms inside its attention or MLP, as in EVA-02',
  r'(.*\.)?rope(_.*)?(\..*)?|(.*\.)?freqs_cis': (
    'a file with rotary positions, other than DINOv3 in the names of timm or transformers,'
  ),
}
# Arrays of a decoder that only pre-training uses, as in MAE.
DECODER_ARRAYS = re.compile(r'decoder(\.|_).*')


def check_supported(names: Iterable[str], source: str):
  """Raise UserError with the reason if an array belongs to a model that is not supported."""
  for name in names:
    for pattern, description in UNSUPPORTED_ARRAYS.items():
      if re.fullmatch(pattern, name):
        raise UserError(f'{source} contains {name}: {description} is not supported')


def is_pretraining_array(name: str) -> bool:
  """Return whether only pre-training uses an array: a mask token, or a decoder's."""
  return name.endswith('mask_token') or bool(DECODER_ARRAYS.fullmatch(name))


def describe_ignored(names: list[str]) -> tuple[str, ...]:
  """Return the note for the arrays that only pre-training uses."""
  if not names:
    return ()
  if len(names) == 1:
    return (f'{names[0]}, which only pre-training uses, is ignored',)
  return (f'{len(names)} arrays that only pre-training uses, such as {names[0]}, are ignored',)
