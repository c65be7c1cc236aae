"""Open a source by name, for random access to its examples: `source[i]` is (image, labels, name).

  builtin:fashion_mnist, builtin:digits    datasets inside the package (array_store.py)
  idx:PATH                                 a directory of IDX files, as MNIST has (array_store.py)
  folder:PATH, csv:PATH                    image files (folder.py)
  tfds:NAME                                a TFDS dataset prepared as ArrayRecord (tfds_source.py)
  vtab:TASK                                a task of VTAB-1k with its own labels (vtab.py)
  records:PATH, records:URL                a source that was packed as ArrayRecord (records.py)
  tar:PATH                                 WebDataset archives (tar_source.py)
  parquet:PATH                             tables of encoded images (parquet_source.py)
  images:PATH                              all images below a folder, unlabelled (folder.py)

Each kind is a store with the attributes `title` (KIND:NAME, as the user writes it), `splits` (their
names) and `label_names` (those of the classes), and these methods:

  shard_lengths(split)       number of examples in each of the files of a split
  max_labels(split)          largest number of labels of an example, at least 1
  index_bytes(split)         bytes that differ if the names or labels of the examples differ
  read_example(split, i)     (data, labels, name), as `Source.__getitem__`
  read_labels(split)         labels [n, m] of all examples; absent if only the records state them
  read_ahead(examples)       begin to fetch (split, i) that are needed soon; absent if of no use

Several threads call `read_example` at the same time. Stores open their files after unpickling, so
little is sent to a worker process.
"""

import bisect
import hashlib
import itertools
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from vit_jax.data.array_store import BUILTIN_LABEL_NAMES, open_builtin, open_idx
from vit_jax.data.class_names import check_class_names
from vit_jax.data.folder import CsvStore, FolderStore, UnlabelledFolderStore
from vit_jax.data.held_out import parse_part, take_part
from vit_jax.data.parquet_source import ParquetStore, UnlabelledParquetStore
from vit_jax.data.records import is_packed, open_records, open_unlabelled_records
from vit_jax.data.tar_source import TarStore, UnlabelledTarStore
from vit_jax.data.tfds_source import TfdsStore, UnlabelledTfdsStore
from vit_jax.data.vtab import VtabStore
from vit_jax.errors import UserError, did_you_mean

# Their images are files of the user.
USER_FILE_KINDS = ('folder', 'csv', 'images', 'tar', 'parquet')
FILE_KINDS = {'.csv': 'csv', '.tar': 'tar', '.parquet': 'parquet'}  # By extension.
EVAL_SPLITS = ('test', 'validation', 'val')  # The first one that exists is the default.


class Source:
  """The examples of a split. Thread-safe and picklable.

  `source[i]` is (data, labels, name):
    data: The bytes of an image file, or uint8 pixels [h, w] or [h, w, 3].
    labels: Indices into `label_names`.
    name: Identifies the example in messages.
  """

  unlabelled = None  # A mixture (mixture.py) has a second source here.

  def __init__(self, store, spans: list[tuple[str, int, int]]):
    """Concatenate the given (split, start, stop) spans of a store."""
    self._store, self._spans = store, spans
    self._span_ends = list(itertools.accumulate(stop - start for _, start, stop in spans))
    self.label_names: tuple[str, ...] = store.label_names
    self.classes: int = len(store.label_names)
    self.split: str = '+'.join(dict.fromkeys(split for split, _, _ in spans))

  @property
  def title(self) -> str:
    """The name of the source: KIND:NAME."""
    return self._store.title

  @property
  def kind(self) -> str:
    """The kind of the source; for packed data, of the source that was packed."""
    return getattr(self._store, 'source_kind', self.title.partition(':')[0])

  @property
  def labelled(self) -> 'Source':
    """The examples with labels; an epoch is one pass over them."""
    return self

  @property
  def split_sizes(self) -> dict[str, int]:
    """The number of examples from each split."""
    out = dict.fromkeys((split for split, _, _ in self._spans), 0)
    for split, start, stop in self._spans:
      out[split] += stop - start
    return out

  @property
  def max_labels(self) -> int:
    """The largest number of labels of an example in these splits, at least 1."""
    return max(self._store.max_labels(split) for split in self.split_sizes)

  def read_labels(self) -> np.ndarray | None:
    """Return the labels [n, m], padded with -1, or None if only the records state labels."""
    if not hasattr(self._store, 'read_labels'):
      return None
    tables = {split: self._store.read_labels(split) for split in self.split_sizes}
    width = max(table.shape[1] for table in tables.values())
    spans = [tables[split][start:stop] for split, start, stop in self._spans]
    pad = lambda span: np.pad(span, ((0, 0), (0, width - span.shape[1])), constant_values=-1)
    return np.concatenate([pad(span) for span in spans])

  def class_counts(self) -> np.ndarray | None:
    """Return the number of examples [k] of each class, or None if only the records state labels."""
    labels = self.read_labels()
    if labels is None:
      return None
    return np.bincount(labels[labels >= 0], minlength=self.classes)

  def is_user_file(self, i: int) -> bool:
    """Return whether example `i` is a file of the user, not a record of a published data set."""
    del i  # A source has one store.
    return self.kind in USER_FILE_KINDS

  def index_checksum(self) -> str:
    """Return a checksum of the spans and of the names and labels, without reading images."""
    digest = hashlib.blake2b(repr(self._spans).encode(), digest_size=8)
    for split in self.split_sizes:
      digest.update(self._store.index_bytes(split))
    return digest.hexdigest()

  def slice(self, start: int, stop: int) -> 'Source':
    """Return the examples from `start` to `stop`, or to the end if there are fewer."""
    spans, begin = [], 0
    for split, first, last in self._spans:
      cut = (split, first + max(0, start - begin), min(last, first + stop - begin))
      spans += [cut] if cut[1] < cut[2] else []
      begin += last - first
    return Source(self._store, spans)

  def subsample(self, n: int) -> 'Source':
    """Return `n` evenly spaced examples, or all if there are fewer.

    Even spacing covers every class of a split that is sorted by class.
    """
    chosen = [self._locate(int(i)) for i in np.linspace(0, len(self) - 1, min(n, len(self)))]
    return Source(self._store, [(split, i, i + 1) for split, i in chosen])

  def read_ahead(self, indices: Iterable[int]):
    """Begin to read examples that are needed soon, if they are in object storage."""
    if hasattr(self._store, 'read_ahead'):
      self._store.read_ahead(self._locate(i) for i in indices)

  def __len__(self) -> int:
    return self._span_ends[-1]

  def __getitem__(self, i: int) -> tuple[bytes | np.ndarray, tuple[int, ...], str]:
    return self._store.read_example(*self._locate(i))

  def _locate(self, i: int) -> tuple[str, int]:
    """Return (split, index in the split) of example `i`."""
    if not 0 <= i < len(self):
      raise IndexError(f'example {i} of {len(self)}')
    span = bisect.bisect_right(self._span_ends, i)
    split, _, stop = self._spans[span]
    return split, stop - self._span_ends[span] + i

  def __repr__(self) -> str:
    return f'Source({self._store.title} {self.split}, {len(self)} examples, {self.classes} classes)'


STORES = {
  'builtin': open_builtin,
  'idx': open_idx,
  'folder': FolderStore,
  'csv': CsvStore,
  'tfds': TfdsStore,
  'vtab': VtabStore,
  'records': open_records,
  'tar': TarStore,
  'parquet': ParquetStore,
}

UNLABELLED_STORES = {
  'images': UnlabelledFolderStore,
  'tfds': UnlabelledTfdsStore,
  'records': open_unlabelled_records,
  'tar': UnlabelledTarStore,
  'parquet': UnlabelledParquetStore,
}


def open_source(
  name: str, split: str, *, dir: str = '', stores: dict[str, Callable] = STORES
) -> Source:
  """Open a split of a source.

  Args:
    name: KIND:NAME, such as 'tfds:cifar10'.
    split: A split in TFDS's syntax, or a part of one as in held_out.py; '' selects the default
      evaluation split.
    dir: The directory of TFDS datasets; '' selects TFDS's default.
    stores: {KIND: store}.

  Raises UserError if the name or the split is unknown, or if the data is missing or damaged.
  """
  kind, colon, rest = name.partition(':')
  if not colon or kind not in stores:
    raise UserError(f'source {name!r}: expected KIND:NAME.{_suggest_source(kind, rest, name)}')
  try:
    store = stores[kind](rest, dir=dir)
    check_class_names(store.label_names, name)
    spans = _parse_split(split or _default_eval_split(store), store)
  except OSError as error:
    raise UserError(f'{name}: {error.filename or "error"}: {error.strerror or error}') from None
  return Source(store, spans)


def open_unlabelled(name: str, split: str, *, dir: str = '') -> Source:
  """Open a source without using its labels, if it has any. See `open_source`."""
  return open_source(name, split, dir=dir, stores=STORES | UNLABELLED_STORES)


def _suggest_source(kind: str, rest: str, name: str) -> str:
  if rest:
    return did_you_mean(kind, STORES)
  if name in BUILTIN_LABEL_NAMES:
    return f" Did you mean 'builtin:{name}'?"
  if found := kind_of_path(Path(name)):
    return f' Did you mean {f"{found}:{name}"!r}?'
  return f" Did you mean 'tfds:{name}'? KIND is one of {', '.join(STORES)}."


def kind_of_path(path: Path) -> str:
  """Return the kind of source that a file or folder is, or '' if it does not exist."""
  if path.is_dir():
    return 'records' if is_packed(path) else 'folder'
  return FILE_KINDS.get(path.suffix.lower(), 'csv') if path.exists() else ''


def _default_eval_split(store) -> str:
  for split in EVAL_SPLITS:
    if split in store.splits:
      return split
  raise UserError(
    f'{store.title} has no split {", ".join(EVAL_SPLITS)} to evaluate on. It has '
    f'{", ".join(store.splits)}: name a split, such as {store.splits[0]}[90%:]'
  )


def _parse_split(spec: str, store) -> list[tuple[str, int, int]]:
  """Parse 'train[:98%]+test' or 'train/held_out:10%' into [(split, start, stop), …]."""
  name = spec
  spec, part, fraction = parse_part(spec)
  names = [term.partition('[')[0].strip() for term in spec.split('+')]
  for split in names:
    if split not in (*store.splits, 'all'):
      near = did_you_mean(split, store.splits, list_known=False)
      has = ', '.join(store.splits)
      raise UserError(f'{store.title} has no split {split!r}: it has {has}.{near}')
  names = store.splits if 'all' in names else names
  lengths = {name: store.shard_lengths(name) for name in names}
  spans = resolve_split(spec, lengths, store.title)
  spans = [(split, start, stop) for split, start, stop in spans if stop > start]
  if part:
    spans = take_part(spans, part, fraction, getattr(store, 'read_labels', None))
  if not spans:
    hint = _explain_no_examples(store, 'held_out' if part else spec)
    raise UserError(f'{store.title} has no examples in the split {name!r}{hint}')
  return spans


def _explain_no_examples(store, split: str) -> str:
  """Return what to do if a folder or CSV file has too few images to hold some out, or ''."""
  if store.title.partition(':')[0] not in USER_FILE_KINDS or split not in ('test', 'held_out'):
    return ''
  advice = ': each class needs two images or more, of which one is held out'
  other = '. To evaluate on another folder, give --config.data.eval=folder:PATH'
  return advice + (other if split == 'test' else '')


def resolve_split(
  spec: str, shard_lengths: dict[str, list[int]], title: str
) -> list[tuple[str, int, int]]:
  """Parse a split with TFDS's own parser."""
  if spec in shard_lengths:  # Importing TFDS takes longer than everything else here.
    return [(spec, 0, sum(shard_lengths[spec]))]
  import tensorflow_datasets as tfds

  infos = {
    name: types.SimpleNamespace(num_examples=sum(lengths), shard_lengths=lengths)
    for name, lengths in shard_lengths.items()
  }
  try:
    parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
  except (ValueError, NotImplementedError) as error:
    syntax = "expected TFDS's syntax, such as 'train', 'train[:98%]', 'train+test'"
    problem = error if 'incompatible' in str(error) else syntax
    raise UserError(f'{title}, split {spec!r}: {problem}') from None
  spans = []
  for part in parts:
    stop = infos[part.splitname].num_examples if part.to is None else part.to
    spans.append((part.splitname, part.from_ or 0, stop))
  return spans
