"""Fingerprint of a run's data, so that a run is not resumed with other data by mistake.

Batch k is a function of the data settings, the seed, k, and the contents of the source. The
fingerprint covers the contents, and the versions of the order and of the augmentation, which code
may change while the settings stay the same.
"""

import hashlib

import numpy as np

from vit_jax.data.decode import BadImageError
from vit_jax.data.images import AUGMENTATION_VERSION
from vit_jax.data.sampler import ORDER_VERSION
from vit_jax.data.sources import Source

CONTENT_SAMPLES = 16  # Examples that are read to fingerprint a source.


def fingerprint_data(train, evaluation: Source) -> dict[str, object]:
  """Return facts such as {'train.examples': 800, …} that are equal for equal data.

  They do not depend on where the data is stored.
  """
  out = {'order': ORDER_VERSION, 'augmentation': AUGMENTATION_VERSION}
  sources = {'train': train.labelled, 'unlabelled': train.unlabelled, 'eval': evaluation}
  for name, source in sources.items():
    if source is not None:
      out |= {f'{name}.{fact}': value for fact, value in source_facts(source).items()}
  return out


def source_facts(source: Source) -> dict[str, object]:
  """Return the number of examples and the checksums of a source."""
  return {
    'examples': len(source),
    'listing': source.index_checksum(),
    'content': checksum_samples(source),
  }


def checksum_samples(source: Source) -> str:
  """Return a checksum of the data and labels of `CONTENT_SAMPLES` evenly spaced examples."""
  digest, samples = hashlib.blake2b(digest_size=8), source.subsample(CONTENT_SAMPLES)
  for i in range(len(samples)):
    try:
      data, labels, _ = samples[i]
    except BadImageError:
      data, labels = b'', ()
    digest.update(data.tobytes() if isinstance(data, np.ndarray) else data)
    digest.update(repr(labels).encode())
  return digest.hexdigest()


def describe_differences(recorded: dict[str, object], current: dict[str, object]) -> list[str]:
  """Return one line for each fact that differs; none if nothing was recorded."""
  return [
    f'{name}: {recorded.get(name)} there, {value} here'
    for name, value in current.items()
    if recorded and recorded.get(name) != value
  ]
