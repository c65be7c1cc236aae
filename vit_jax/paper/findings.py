"""What a miniature says of a claim of the paper: yes, no, or not to be told from chance, with the numbers."""

import statistics
from collections.abc import Callable

from vit_jax.paper.mini import FEWSHOT, SHARES

Finding = tuple[str, str, str]  # The claim, the verdict, the numbers.


def values(records: list[dict], row: str, column: str, metric: str = 'accuracy') -> list[float]:
  """Per cent, at the last step, in the order of the seeds."""
  chosen = [r for r in records if (r['row'], r['column'], r['metric']) == (row, column, metric)]
  last = max((int(r['steps']) for r in chosen), default=0)
  return [
    100 * float(r['value'])
    for r in sorted(chosen, key=lambda r: int(r['seed']))
    if int(r['steps']) == last
  ]


def verdict(differences: list[float], *, small: bool = False) -> str:
  """Whether the mean of paired differences is above 0 by more than twice its standard error; with one seed, by a point.

  `small`: whether it is instead within a point of 0.
  """
  if not differences:
    return 'not run'
  mean = statistics.mean(differences)
  if small:
    return 'yes' if abs(mean) <= 1 else 'no'
  margin = (
    2 * statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 1.0
  )
  return 'yes' if mean > margin else 'no' if mean < -margin else 'not to be told from chance'


def paired(ours: list[float], theirs: list[float]) -> list[float]:
  """Seed by seed."""
  return [a - b for a, b in zip(ours, theirs, strict=False)]


def said(differences: list[float]) -> str:
  """'+1.2 ± 0.3 points'."""
  if not differences:
    return ''
  deviation = f' ± {statistics.stdev(differences):.1f}' if len(differences) > 1 else ''
  return f'{statistics.mean(differences):+.1f}{deviation} points'


def data_size(records: list[dict]) -> list[Finding]:
  """Of Figures 3 and 4."""
  smallest, *_, largest = SHARES
  gap = {
    share: paired(values(records, 'R-M', share), values(records, 'ViT-M', share))
    for share in SHARES
  }
  few = [
    paired(values(records, name, largest, FEWSHOT), values(records, name, smallest, FEWSHOT))
    for name in ('ViT-M', 'R-M')
  ]
  closing = paired(gap[smallest], gap[largest])
  larger = paired(
    paired(values(records, 'ViT-L', largest), values(records, 'ViT-L', smallest)),
    paired(values(records, 'ViT-M', largest), values(records, 'ViT-M', smallest)),
  )
  return [
    (
      'a ResNet is ahead with little data',
      verdict(gap[smallest]),
      f'R-M less ViT-M on 1/8: {said(gap[smallest])}',
    ),
    (
      'ViT catches up with more',
      verdict(closing),
      f'on all: {said(gap[largest])}; closer by {said(closing)}',
    ),
    (
      'a larger ViT gains more from more data',
      verdict(larger),
      f"ViT-L's gain from 1/8 to all less ViT-M's: {said(larger)}",
    ),
    (
      'more data helps few-shot',
      verdict(few[0] + few[1]),
      f'from 1/8 to all: ViT-M {said(few[0])}, R-M {said(few[1])}',
    ),
  ]


def scaling(records: list[dict]) -> list[Finding]:
  """Of Table 6."""
  of = lambda name: values(records, name, 'Fashion-MNIST')
  medium = [paired(of('R+ViT-M'), of(other)) for other in ('ViT-M', 'R-M')]
  large = paired(of('R+ViT-L'), of('ViT-L'))
  narrows = paired(medium[0], large)
  growth = paired(of('ViT-L'), of('ViT-S'))
  numbers = f'R+ViT-M less ViT-M {said(medium[0])}, less R-M {said(medium[1])}'
  return [
    ('a hybrid is ahead of ViT at small compute', verdict(medium[0]), numbers),
    (
      'its lead vanishes for larger models',
      verdict(narrows),
      f'at L: {said(large)}; less by {said(narrows)}',
    ),
    ('ViT grows with compute', verdict(growth), f'ViT-L less ViT-S {said(growth)}'),
  ]


def optimizers(records: list[dict]) -> list[Finding]:
  """Of Table 7."""
  ahead = [
    paired(*(values(records, 'Fashion-MNIST', f'R-M {kind}', metric) for kind in ('Adam', 'SGD')))
    for metric in ('accuracy', FEWSHOT)
  ]
  return [
    (
      'Adam is no worse than SGD for ResNets',
      verdict([d + 0.5 for d in ahead[0]]),
      f'Adam less SGD {said(ahead[0])}, few-shot {said(ahead[1])}',
    )
  ]


def positions(records: list[dict]) -> list[Finding]:
  """Of Table 8."""
  kinds = dict.fromkeys((r['row'], r['column']) for r in records if r['row'] != 'none')
  base = values(records, '1-D learned', 'Stem only')
  none = paired(base, values(records, 'none', 'Stem only'))
  others = {
    key: paired(values(records, *key), base) for key in kinds if key != ('1-D learned', 'Stem only')
  }
  widest = max(
    others.items(), key=lambda pair: abs(statistics.mean(pair[1] or [0])), default=(('', ''), [])
  )
  return [
    ('position embeddings matter', verdict(none), f'1-D learned less none {said(none)}'),
    (
      'their kind and place hardly do',
      verdict(widest[1], small=True),
      f'the farthest is {", ".join(widest[0])}: {said(widest[1])}',
    ),
  ]


def pooling(records: list[dict]) -> list[Finding]:
  """Of Figure 9."""
  of = lambda name: values(records, name, 'Fashion-MNIST')
  gaps = [paired(of('CLS lr=4e-3'), of(name)) for name in ('GAP lr=4e-3', 'GAP lr=1.5e-3')]
  best = min(gaps, key=lambda gap: statistics.mean(gap) if gap else 100)
  return [
    (
      'class token and mean work alike, each at its rate',
      verdict(best, small=True),
      f'CLS less GAP at 4e-3 {said(gaps[0])}, at 1.5e-3 {said(gaps[1])}',
    )
  ]


def transfer(records: list[dict]) -> list[Finding]:
  """Of Table 5 and §3.2."""
  models = ('ViT-M', 'R-M', 'R+ViT-M')
  over = lambda column, a, b: [
    d
    for m in models
    for d in paired(
      values(records, f'{m} from {a}', column), values(records, f'{m} from {b}', column)
    )
  ]
  across = lambda high, low: [
    d
    for m in models
    for s in ('1/8', '1')
    for d in paired(values(records, f'{m} from {s}', high), values(records, f'{m} from {s}', low))
  ]
  more, higher = (
    over('digits', '1', '1/8'),
    across('Fashion-MNIST at 64 px', 'Fashion-MNIST at 32 px'),
  )
  return [
    (
      'more pre-training data transfers better',
      verdict(more),
      f'digits, from all less from 1/8, over the models: {said(more)}',
    ),
    (
      'fine-tuning at a higher resolution helps',
      verdict(higher),
      f'Fashion-MNIST, 64 less 32 px, over models and parts: {said(higher)}',
    ),
  ]


def masked_patches(records: list[dict]) -> list[Finding]:
  """Of §4.6."""
  gain = paired(
    *(
      values(records, row, 'Fashion-MNIST, 500 labels')
      for row in ('masked patches first', 'from scratch')
    )
  )
  return [
    (
      'masked patches before fine-tuning beat none',
      verdict(gain),
      f'at as many steps of fine-tuning: {said(gain)}',
    )
  ]


FINDINGS: dict[str, Callable[[list[dict]], list[Finding]]] = {
  'data_size': data_size,
  'scaling': scaling,
  'optimizers': optimizers,
  'positions': positions,
  'pooling': pooling,
  'transfer': transfer,
  'masked_patches': masked_patches,
}
