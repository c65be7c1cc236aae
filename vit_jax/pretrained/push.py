"""Prepare the repository of a model on the Hugging Face hub: weights, config, preprocessing, card.

The files have the layout of transformers where it has an equal model, else of timm, else ours.
"""

from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.pretrained.export import describe_lost_facts, export_model
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.pretrained.model_card import LIBRARIES, RunFacts, make_card


def write_repository(
  model: PretrainedModel,
  facts: RunFacts,
  folder: Path,
  name: str,
  *,
  command: str,
  license: str = '',
) -> list[str]:
  """Write the files of the repository `name` to an empty folder, and return notes.

  Raises UserError if no format can represent the model.
  """
  format, to, notes = export_to_first(model, folder)
  lost = [line.removeprefix(f'{to}: ') for line in describe_lost_facts(model, to, format)]
  card = make_card(
    model,
    facts,
    name,
    format,
    command=command,
    license=license,
    limits=[f'{line[:1].upper()}{line[1:]}.' for line in lost],
  )
  (folder / 'README.md').write_text(card, encoding='utf-8')
  return [*notes, *lost]


def export_to_first(model: PretrainedModel, folder: Path) -> tuple[str, Path, list[str]]:
  """Export to the first format that represents the model: (format, path, why not the others)."""
  notes = []
  for format in LIBRARIES:
    to = folder / 'model.npz' if format == 'npz' else folder
    try:
      export_model(model, to, format)
    except UserError as error:
      notes.append(f'not in the layout of {LIBRARIES[format]}: {error}')
    else:
      return format, to, notes
  raise UserError(f'{model.source} cannot be pushed: {"; ".join(notes)}')
