"""Compare the results of the miniatures with the claims of the paper.

Each claim gets a verdict and the differences it rests on, in percentage points.
"""

import statistics
from collections.abc import Callable

from vit_jax.paper.mini import MINI_DATA_FRACTIONS, MINI_FEWSHOT_METRIC

ClaimFinding = tuple[str, str, str]  # (claim, verdict, numbers)


def _seed_values(
  records: list[dict], row: str, column: str, metric: str = 'accuracy'
) -> list[float]:
  """Return the values of a cell at the last step, in percent, ordered by seed."""
  chosen = [r for r in records if (r['row'], r['column'], r['metric']) == (row, column, metric)]
  last = max((int(r['steps']) for r in chosen), default=0)
  return [
    100 * float(r['value'])
    for r in sorted(chosen, key=lambda r: int(r['seed']))
    if int(r['steps']) == last
  ]


def assess_claim(differences: list[float], *, small: bool = False) -> str:
  """Return 'yes', 'no', 'within chance' or 'not run' for a claim about paired differences.

  The claim is that their mean is above 0. It holds if the mean exceeds twice its standard error, or
  one percentage point if there is one seed. With `small`, the claim is that the mean is within a
  point of 0.
  """
  if not differences:
    return 'not run'
  mean = statistics.mean(differences)
  if small:
    return 'yes' if abs(mean) <= 1 else 'no'
  margin = (
    2 * statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 1.0
  )
  return 'yes' if mean > margin else 'no' if mean < -margin else 'within chance'


def _paired_differences(ours: list[float], theirs: list[float]) -> list[float]:
  """Return the differences of two lists of values, seed by seed."""
  return [a - b for a, b in zip(ours, theirs, strict=False)]


def _points(differences: list[float]) -> str:
  """Return the mean and standard deviation as text: '+1.2 ± 0.3 points'."""
  if not differences:
    return ''
  deviation = f' ± {statistics.stdev(differences):.1f}' if len(differences) > 1 else ''
  return f'{statistics.mean(differences):+.1f}{deviation} points'


def _data_size_findings(records: list[dict]) -> list[ClaimFinding]:
  """Assess the claims of Figures 3 and 4."""
  smallest, *_, largest = MINI_DATA_FRACTIONS
  gap = {
    share: _paired_differences(
      _seed_values(records, 'R-M', share), _seed_values(records, 'ViT-M', share)
    )
    for share in MINI_DATA_FRACTIONS
  }
  few = [
    _paired_differences(
      _seed_values(records, name, largest, MINI_FEWSHOT_METRIC),
      _seed_values(records, name, smallest, MINI_FEWSHOT_METRIC),
    )
    for name in ('ViT-M', 'R-M')
  ]
  closing = _paired_differences(gap[smallest], gap[largest])
  larger = _paired_differences(
    _paired_differences(
      _seed_values(records, 'ViT-L', largest), _seed_values(records, 'ViT-L', smallest)
    ),
    _paired_differences(
      _seed_values(records, 'ViT-M', largest), _seed_values(records, 'ViT-M', smallest)
    ),
  )
  return [
    (
      'a ResNet is more accurate with little data',
      assess_claim(gap[smallest]),
      f'R-M minus ViT-M on 1/8: {_points(gap[smallest])}',
    ),
    (
      'ViT catches up with more data',
      assess_claim(closing),
      f'R-M minus ViT-M on all: {_points(gap[largest])}; smaller by {_points(closing)}',
    ),
    (
      'a larger ViT gains more from more data',
      assess_claim(larger),
      f"ViT-L's gain from 1/8 to all minus ViT-M's: {_points(larger)}",
    ),
    (
      'more data improves few-shot accuracy',
      assess_claim(few[0] + few[1]),
      f'from 1/8 to all: ViT-M {_points(few[0])}, R-M {_points(few[1])}',
    ),
  ]


def _scaling_findings(records: list[dict]) -> list[ClaimFinding]:
  """Assess the claims of Table 6."""
  of = lambda name: _seed_values(records, name, 'Fashion-MNIST')
  medium = [_paired_differences(of('R+ViT-M'), of(other)) for other in ('ViT-M', 'R-M')]
  large = _paired_differences(of('R+ViT-L'), of('ViT-L'))
  narrows = _paired_differences(medium[0], large)
  growth = _paired_differences(of('ViT-L'), of('ViT-S'))
  numbers = f'R+ViT-M minus ViT-M {_points(medium[0])}, minus R-M {_points(medium[1])}'
  return [
    ('a hybrid is more accurate than ViT at small compute', assess_claim(medium[0]), numbers),
    (
      'the advantage of the hybrid vanishes for larger models',
      assess_claim(narrows),
      f'R+ViT-L minus ViT-L {_points(large)}; smaller by {_points(narrows)}',
    ),
    (
      'the accuracy of ViT grows with compute',
      assess_claim(growth),
      f'ViT-L minus ViT-S {_points(growth)}',
    ),
  ]


def _optimizer_findings(records: list[dict]) -> list[ClaimFinding]:
  """Assess the claim of Table 7."""
  ahead = [
    _paired_differences(
      *(_seed_values(records, 'Fashion-MNIST', f'R-M {kind}', metric) for kind in ('Adam', 'SGD'))
    )
    for metric in ('accuracy', MINI_FEWSHOT_METRIC)
  ]
  return [
    (
      'Adam is no worse than SGD for ResNets',
      assess_claim([d + 0.5 for d in ahead[0]]),
      f'Adam minus SGD {_points(ahead[0])}, few-shot {_points(ahead[1])}',
    )
  ]


def _position_findings(records: list[dict]) -> list[ClaimFinding]:
  """Assess the claims of Table 8."""
  kinds = dict.fromkeys((r['row'], r['column']) for r in records if r['row'] != 'none')
  base = _seed_values(records, '1-D learned', 'Stem only')
  none = _paired_differences(base, _seed_values(records, 'none', 'Stem only'))
  others = {
    key: _paired_differences(_seed_values(records, *key), base)
    for key in kinds
    if key != ('1-D learned', 'Stem only')
  }
  widest = max(
    others.items(), key=lambda pair: abs(statistics.mean(pair[1] or [0])), default=(('', ''), [])
  )
  return [
    (
      'position embeddings matter',
      assess_claim(none),
      f'1-D learned minus none {_points(none)}',
    ),
    (
      'their kind and place hardly matter',
      assess_claim(widest[1], small=True),
      f'the largest difference is that of {", ".join(widest[0])}: {_points(widest[1])}',
    ),
  ]


def _pooling_findings(records: list[dict]) -> list[ClaimFinding]:
  """Assess the claim of Figure 9."""
  of = lambda name: _seed_values(records, name, 'Fashion-MNIST')
  gaps = [
    _paired_differences(of('CLS lr=4e-3'), of(name)) for name in ('GAP lr=4e-3', 'GAP lr=1.5e-3')
  ]
  best = min(gaps, key=lambda gap: statistics.mean(gap) if gap else 100)
  return [
    (
      'class token and mean are equally accurate, each at its learning rate',
      assess_claim(best, small=True),
      f'CLS minus GAP at 4e-3 {_points(gaps[0])}, at 1.5e-3 {_points(gaps[1])}',
    )
  ]


def _transfer_findings(records: list[dict]) -> list[ClaimFinding]:
  """Assess the claims of Table 5 and §3.2."""
  models = ('ViT-M', 'R-M', 'R+ViT-M')
  over = lambda column, a, b: [
    d
    for m in models
    for d in _paired_differences(
      _seed_values(records, f'{m} from {a}', column), _seed_values(records, f'{m} from {b}', column)
    )
  ]
  across = lambda high, low: [
    d
    for m in models
    for s in ('1/8', '1')
    for d in _paired_differences(
      _seed_values(records, f'{m} from {s}', high), _seed_values(records, f'{m} from {s}', low)
    )
  ]
  more, higher = (
    over('digits', '1', '1/8'),
    across('Fashion-MNIST at 64 px', 'Fashion-MNIST at 32 px'),
  )
  return [
    (
      'more pre-training data transfers better',
      assess_claim(more),
      f'digits, from all minus from 1/8, over the models: {_points(more)}',
    ),
    (
      'fine-tuning at a higher resolution helps',
      assess_claim(higher),
      f'Fashion-MNIST, 64 minus 32 px, over models and parts: {_points(higher)}',
    ),
  ]


def _masked_patch_findings(records: list[dict]) -> list[ClaimFinding]:
  """Assess the claim of §4.6."""
  gain = _paired_differences(
    *(
      _seed_values(records, row, 'Fashion-MNIST, 500 labels')
      for row in ('masked patches first', 'from scratch')
    )
  )
  return [
    (
      'masked patch prediction before fine-tuning improves accuracy',
      assess_claim(gain),
      f'at the same number of fine-tuning steps: {_points(gain)}',
    )
  ]


MINI_FINDINGS: dict[str, Callable[[list[dict]], list[ClaimFinding]]] = {
  'data_size': _data_size_findings,
  'scaling': _scaling_findings,
  'optimizers': _optimizer_findings,
  'positions': _position_findings,
  'pooling': _pooling_findings,
  'transfer': _transfer_findings,
  'masked_patches': _masked_patch_findings,
}
