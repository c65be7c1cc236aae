"""A name -> random access to the examples behind it: `source[i]` is (image, labels, name).

  builtin:fashion_mnist, builtin:digits    inside the package
  folder:PATH, csv:PATH                    image files (folder.py)
  tfds:NAME                                a TFDS data set prepared as ArrayRecord (tfds_source.py)
  vtab:TASK                                a thousand images and more of one of those, with labels of their own (vtab.py)

Behind each is a store: `title`, `splits`, `label_names`, `shards(split)` (the number of examples in each of its files),
`most_labels(split)`, `listing(split)` (bytes that are others where the examples are) and `read(split, i)`. It opens what it
reads from after unpickling: little crosses to a process.
"""

import bisect
import hashlib
import itertools
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax.data.folder import CsvStore, FolderStore
from vit_jax.data.tfds_source import TfdsStore
from vit_jax.data.vtab import VtabStore
from vit_jax.errors import UserError, did_you_mean

EVAL_SPLITS = (
  'test',
  'validation',
  'val',
)  # The order in which a split to evaluate on is looked for.

BUILTIN_LABEL_NAMES = {
  'digits': ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9'),
  'fashion_mnist': (
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
  ),
}  # fmt: skip


class Source:
  """The examples of a split: `len(source)`, and `source[i]` -> (data, labels, name).

  data: the bytes of an image file, not decoded, or a uint8 array [h, w] or [h, w, 3]. labels: indices into
  `label_names`. name: tells a person which example it is. May be read from several threads at once, and pickled.
  """

  unlabelled = None  # A mixture (mixture.py) has such examples besides.

  def __init__(self, store, spans: list[tuple[str, int, int]]):
    """`spans`: (split, start, stop) for each piece of the store, one after another."""
    self._store, self._spans = store, spans
    self._ends = list(itertools.accumulate(stop - start for _, start, stop in spans))
    self.label_names: tuple[str, ...] = store.label_names
    self.classes: int = len(store.label_names)
    self.split: str = '+'.join(dict.fromkeys(split for split, _, _ in spans))

  @property
  def labelled(self) -> 'Source':
    """The examples that have labels of their own: an epoch is once through these."""
    return self

  @property
  def examples(self) -> dict[str, int]:
    """{split: the number of its examples that are here}."""
    out = dict.fromkeys((split for split, _, _ in self._spans), 0)
    for split, start, stop in self._spans:
      out[split] += stop - start
    return out

  @property
  def most_labels(self) -> int:
    """Of any one example of these splits, at least 1."""
    return max(self._store.most_labels(split) for split in self.examples)

  def listing(self) -> str:
    """A digest of what tells the examples apart without reading them: names, labels, and which of them."""
    digest = hashlib.blake2b(repr(self._spans).encode(), digest_size=8)
    for split in self.examples:
      digest.update(self._store.listing(split))
    return digest.hexdigest()

  def part(self, start: int, stop: int) -> 'Source':
    """The examples from `start` to `stop`, or to the last."""
    begins = [
      end - (last - first) for end, (_, first, last) in zip(self._ends, self._spans, strict=True)
    ]
    cut = [
      (split, first + max(0, start - begin), min(last, first + stop - begin))
      for begin, (split, first, last) in zip(begins, self._spans, strict=True)
    ]
    return Source(self._store, [(split, first, last) for split, first, last in cut if last > first])

  def spread(self, n: int) -> 'Source':
    """`n` of the examples (all, if there are fewer), evenly spaced: of every class, where they lie class by class."""
    chosen = [self._locate(int(i)) for i in np.linspace(0, len(self) - 1, min(n, len(self)))]
    return Source(self._store, [(split, i, i + 1) for split, i in chosen])

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, i: int) -> tuple[bytes | np.ndarray, tuple[int, ...], str]:
    return self._store.read(*self._locate(i))

  def _locate(self, i: int) -> tuple[str, int]:
    """The split that example `i` is of, and its number there."""
    if not 0 <= i < len(self):
      raise IndexError(f'example {i} of {len(self)}')
    piece = bisect.bisect_right(self._ends, i)
    split, _, stop = self._spans[piece]
    return split, stop - self._ends[piece] + i

  def __repr__(self) -> str:
    return f'Source({self._store.title} {self.split}, {len(self)} examples, {self.classes} classes)'


class BuiltinStore:
  """Data inside the package, which builtin/pack.py has put there."""

  def __init__(self, name: str, *, dir: str = ''):
    if name not in BUILTIN_LABEL_NAMES:
      raise UserError(
        f'built-in data set {name!r} is unknown.{did_you_mean(name, BUILTIN_LABEL_NAMES)}'
      )
    self.title, self.label_names = f'builtin:{name}', BUILTIN_LABEL_NAMES[name]
    self._path = Path(__file__).parent / 'builtin' / f'{name}.npz'
    self.splits = ('train', 'test')
    self._images = {}
    with np.load(self._path) as arrays:
      self._labels = {split: arrays[f'{split}_labels'] for split in self.splits}

  def __getstate__(self) -> dict:
    return self.__dict__ | {'_images': {}}

  def shards(self, split: str) -> list[int]:
    return [len(self._labels[split])]

  def most_labels(self, split: str) -> int:
    return 1

  def listing(self, split: str) -> bytes:
    return self._labels[split].tobytes()

  def read(self, split: str, i: int):
    if split not in self._images:
      with np.load(self._path) as arrays:
        self._images[split] = arrays[f'{split}_images']  # [n, h, w]
    return self._images[split][i], (int(self._labels[split][i]),), f'{self.title} {split} #{i}'


STORES = {
  'builtin': BuiltinStore,
  'folder': FolderStore,
  'csv': CsvStore,
  'tfds': TfdsStore,
  'vtab': VtabStore,
}


def open_source(
  name: str, split: str, *, dir: str = '', stores: dict[str, Callable] = STORES
) -> Source:
  """The examples of `split` (TFDS's syntax; '' means the held-out split) of the source `name`, such as 'tfds:cifar10'.

  `dir`: where TFDS data sets lie; '' means TFDS's default. UserError says what is wrong with name, split or data.
  """
  kind, colon, rest = name.partition(':')
  if not colon or kind not in stores:
    raise UserError(f'source {name!r}: expected KIND:NAME.{_suggest_source(kind, rest, name)}')
  try:
    store = stores[kind](rest, dir=dir)
    spans = _parse_split(split or _default_eval_split(store), store)
  except OSError as error:
    raise UserError(f'{name}: {error.filename or "error"}: {error.strerror or error}') from None
  return Source(store, spans)


def _suggest_source(kind: str, rest: str, name: str) -> str:
  if rest:
    return did_you_mean(kind, STORES)
  if name in BUILTIN_LABEL_NAMES:
    return f" Did you mean 'builtin:{name}'?"
  if Path(name).exists():
    return f' Did you mean {("folder:" if Path(name).is_dir() else "csv:") + name!r}?'
  return f" Did you mean 'tfds:{name}'? KIND is one of {', '.join(STORES)}."


def _default_eval_split(store) -> str:
  for split in EVAL_SPLITS:
    if split in store.splits:
      return split
  has = f'it has {", ".join(store.splits)}; name one, such as {store.splits[0]}[90%:]'
  raise UserError(
    f'{store.title} has none of the splits {", ".join(EVAL_SPLITS)} to evaluate on: {has}'
  )


def _parse_split(spec: str, store) -> list[tuple[str, int, int]]:
  """[(split, start, stop), …] of 'train[:98%]+test'."""
  names = [part.partition('[')[0].strip() for part in spec.split('+')]
  for name in names:
    if name not in (*store.splits, 'all'):
      near = did_you_mean(name, store.splits).partition(' Known')[0]
      raise UserError(
        f'{store.title} has no split {name!r}: it has {", ".join(store.splits)}.{near}'
      )
  names = store.splits if 'all' in names else names
  shards = {name: store.shards(name) for name in names}
  spans = [
    (name, start, stop)
    for name, start, stop in _resolve_split(spec, shards, store.title)
    if stop > start
  ]
  if not spans:
    raise UserError(f'{store.title} has no examples in the split {spec!r}')
  return spans


def _resolve_split(
  spec: str, shards: dict[str, list[int]], title: str
) -> list[tuple[str, int, int]]:
  """TFDS's own reading of its split syntax."""
  if spec in shards:
    return [(spec, 0, sum(shards[spec]))]  # Saves importing TFDS, which takes longer than the rest.
  import tensorflow_datasets as tfds

  infos = {
    name: types.SimpleNamespace(num_examples=sum(each), shard_lengths=each)
    for name, each in shards.items()
  }
  try:
    pieces = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
  except (ValueError, NotImplementedError) as error:
    syntax = "expected TFDS's syntax, such as 'train', 'train[:98%]', 'train+test'"
    raise UserError(
      f'{title}, split {spec!r}: {error if "incompatible" in str(error) else syntax}'
    ) from None
  size = lambda name: infos[name].num_examples
  return [(p.splitname, p.from_ or 0, size(p.splitname) if p.to is None else p.to) for p in pieces]
