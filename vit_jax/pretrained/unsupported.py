"""Recognize arrays of Vision Transformers whose function our model does not have."""

import re
from collections.abc import Iterable

from vit_jax.errors import UserError

# Names in the files of timm, Hugging Face and the models' authors -> what has such arrays.
UNSUPPORTED_ARRAYS = {
  r'(.*\.)?rel_pos(_[a-z])?(\..*)?': 'a model with other relative positions than those of BEiT',
  r'lm_head\..*': 'a model that predicts visual tokens, as BEiT does before its fine-tuning,',
  r'(.*\.)?attn\.norm\..*': 'a model with a norm inside its attention, as in EVA-02 CLIP,',
  r'(.*\.)?rope(_.*)?(\..*)?|(.*\.)?freqs_cis': (
    'a file with rotary positions other than those of DINOv3 and ViT-5'
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
