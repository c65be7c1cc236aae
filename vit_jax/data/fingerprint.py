"""What the data of a run are, so that one that goes on with other data says so instead of mixing the two.

Batch k is a function of the data settings, the seed, k, and of what lies behind the source: that is what is told here, with the
versions of the order and of the augmentation, which code may change where the settings stay.
"""

import hashlib

import numpy as np

from vit_jax.data.images import AUGMENTATION_VERSION, BadImageError
from vit_jax.data.order import ORDER_VERSION
from vit_jax.data.sources import Source

CONTENT_SAMPLES = 16  # Examples whose content is looked at.


def fingerprint_data(train: Source, evaluation: Source) -> dict[str, object]:
  """{'train.examples': 800, …}: equal for equal data, wherever they lie."""
  out = {'order': ORDER_VERSION, 'augmentation': AUGMENTATION_VERSION}
  sources = {'train': train.labelled, 'unlabelled': train.unlabelled, 'eval': evaluation}
  for name, source in ((name, source) for name, source in sources.items() if source is not None):
    facts = {
      'examples': len(source),
      'listing': source.listing(),
      'content': checksum_samples(source),
    }
    out |= {f'{name}.{fact}': value for fact, value in facts.items()}
  return out


def checksum_samples(source: Source) -> str:
  """A digest of `CONTENT_SAMPLES` examples spread over the source: their bytes or pixels, and labels."""
  digest, some = hashlib.blake2b(digest_size=8), source.spread(CONTENT_SAMPLES)
  for i in range(len(some)):
    try:
      data, labels, _ = some[i]
    except BadImageError:
      data, labels = b'', ()
    digest.update(data.tobytes() if isinstance(data, np.ndarray) else data)
    digest.update(repr(labels).encode())
  return digest.hexdigest()


def describe_differences(there: dict[str, object], here: dict[str, object]) -> list[str]:
  """Each fact that is not the same, in words; none where nothing is known `there`."""
  return [
    f'{name}: {there.get(name)} there, {value} here'
    for name, value in here.items()
    if there and there.get(name) != value
  ]
