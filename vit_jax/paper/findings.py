"""Compare the results of the miniatures with the claims of the paper.

A claim is tested at several scales, by the differences of runs with the same seed, in percentage
points. The verdict at a scale follows from their mean and its standard error.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable

from vit_jax.paper.mini import (
  ALL,
  DATA_TITLES,
  FAMILIES,
  FEWSHOT_METRIC,
  MIDDLE,
  RESOLUTIONS,
  SCALES,
  SMALLEST,
  TARGETS,
  resolution_row,
  steps_column,
)

HOLDS, FAILS, OPEN = 'holds', 'does not hold', 'not decidable here'
ONE_SEED, NOT_RUN = 'not decidable yet (one seed)', 'not run'
# Differences of up to a point are small.
SMALL_POINTS = 1.0
# Student's t at 95 %, one-sided, by the number of seeds; more seeds have that of the last.
_STUDENT_T = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13}

Differences = dict[str, float]  # By seed, in percentage points.


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
  """A finding of the paper: that the mean difference is above 0 at every scale.

  With `small`, that it is at most a point from 0.
  """

  text: str
  scales: dict[str, Differences]
  small: bool = False

  @property
  def verdict(self) -> str:
    """The verdict of all scales, or the scales of each verdict if they differ."""
    by_verdict: dict[str, list[str]] = {}
    for scale, differences in self.scales.items():
      by_verdict.setdefault(assess(differences, small=self.small), []).append(scale)
    if len(by_verdict) == 1:
      return next(iter(by_verdict))
    return '; '.join(f'{verdict}: {", ".join(names)}' for verdict, names in by_verdict.items())

  @property
  def numbers(self) -> str:
    """The mean difference and its standard error at each scale."""
    return '; '.join(f'{scale} {format_points(each)}' for scale, each in self.scales.items())


def assess(differences: Differences, *, small: bool = False) -> str:
  """Return the verdict about a claim at one scale.

  It is decided if the one-sided 95 % confidence interval of the mean, over the seeds, is above or
  below 0; with `small`, if it is inside or outside of a point around 0.
  """
  if not differences:
    return NOT_RUN
  if len(differences) == 1:
    return ONE_SEED
  mean, error = _mean_and_error(differences)
  margin = _STUDENT_T[min(len(differences), max(_STUDENT_T))] * error
  low, high = mean - margin, mean + margin
  if small:
    inside = low >= -SMALL_POINTS and high <= SMALL_POINTS
    outside = low > SMALL_POINTS or high < -SMALL_POINTS
    return HOLDS if inside else FAILS if outside else OPEN
  return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def _mean_and_error(differences: Differences) -> tuple[float, float]:
  """Return the mean and the standard error of two differences or more."""
  values = [*differences.values()]
  return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def format_points(differences: Differences) -> str:
  """Return the mean and its standard error: '+1.2 ± 0.3', '+1.2', or 'not run'."""
  if not differences:
    return NOT_RUN
  if len(differences) == 1:
    return f'{next(iter(differences.values())):+.1f}'
  mean, error = _mean_and_error(differences)
  return f'{mean:+.1f} ± {error:.1f}'


def _minus(ours: Differences, theirs: Differences) -> Differences:
  """Return the differences of the seeds that both have."""
  return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def _average(parts: Iterable[Differences]) -> Differences:
  """Return the means over the parts, of the seeds that all have."""
  parts = list(parts)
  return {
    seed: statistics.mean(part[seed] for part in parts)
    for seed in parts[0]
    if all(seed in part for part in parts)
  }


class _Cells:
  """Accuracies in percent, by row, column and metric."""

  def __init__(self, records: list[dict]):
    self.steps: dict[tuple, dict[int, Differences]] = {}
    for record in records:
      key = (record['row'], record['column'], record['metric'])
      of_step = self.steps.setdefault(key, {}).setdefault(int(record['steps']), {})
      of_step[str(record['seed'])] = 100 * float(record['value'])

  def __call__(self, row: str, column: str, metric: str = 'accuracy') -> Differences:
    """Return the values at the last step, by seed."""
    steps = self.steps.get((row, column, metric), {})
    return steps[max(steps)] if steps else {}

  def gap(self, ours: str, theirs: str, column: str, metric: str = 'accuracy') -> Differences:
    """Return the differences of two rows in a column."""
    return _minus(self(ours, column, metric), self(theirs, column, metric))


def _data_size_claims(records: list[dict]) -> list[Claim]:
  """Claims of Figures 3 and 4."""
  cells = _Cells(records)
  cifar, fashion = DATA_TITLES['cifar10'], DATA_TITLES['fashion_mnist']
  gaps = {
    f'{data}, {images}': cells.gap('R-S', 'ViT-S', f'{data}, {images}')
    for data, scales in ((cifar, SCALES), (fashion, (SMALLEST, ALL)))
    for images in scales
  }
  closing = {
    f'{data} from {few} to {many}': _minus(gaps[f'{data}, {few}'], gaps[f'{data}, {many}'])
    for data, few, many in (
      (cifar, SMALLEST, MIDDLE),
      (cifar, MIDDLE, ALL),
      (cifar, SMALLEST, ALL),
      (fashion, SMALLEST, ALL),
    )
  }
  larger = {images: cells.gap('ViT-L', 'ViT-S', f'{cifar}, {images}') for images in (SMALLEST, ALL)}
  few_shot = {
    f'{model}, {data}': _minus(
      cells(model, f'{data}, {ALL}', FEWSHOT_METRIC),
      cells(model, f'{data}, {SMALLEST}', FEWSHOT_METRIC),
    )
    for data in (cifar, fashion)
    for model in ('ViT-S', 'R-S')
  }
  return [
    Claim('a ResNet is more accurate than a ViT with little data (R-S minus ViT-S)', gaps),
    Claim('ViT catches up with more data (how much the gap shrinks)', closing),
    Claim(
      'a larger ViT is less accurate with little data (ViT-S minus ViT-L)',
      {images: {seed: -value for seed, value in each.items()} for images, each in larger.items()},
    ),
    Claim(
      'a larger ViT gains more from more data (gain of ViT-L minus that of ViT-S)',
      {f'from {SMALLEST} to {ALL}': _minus(larger[ALL], larger[SMALLEST])},
    ),
    Claim(f'more data improves 5-shot accuracy on digits ({ALL} minus {SMALLEST})', few_shot),
  ]


def _scaling_claims(records: list[dict]) -> list[Claim]:
  """Claims of Table 6 and Figure 5."""
  cells = _Cells(records)
  columns = [steps_column(steps) for steps in SCALES]
  sized = lambda ours, theirs: {
    f'{size}, {column}': cells.gap(f'{ours}-{size}', f'{theirs}-{size}', column)
    for size in 'SL'
    for column in columns
  }
  hybrid = sized('R+ViT', 'ViT')
  growth = {
    f'{family}, {column}': cells.gap(f'{family}-L', f'{family}-S', column)
    for family in FAMILIES
    for column in columns
  }
  return [
    Claim('at equal compute a ViT is more accurate than a ResNet', sized('ViT', 'R')),
    Claim('a hybrid is more accurate than a ViT at small compute', hybrid),
    Claim(
      'the advantage of the hybrid is smaller for larger models (at S minus at L)',
      {each: _minus(hybrid[f'S, {each}'], hybrid[f'L, {each}']) for each in columns},
    ),
    Claim('accuracy grows with the size of the model (L minus S)', growth),
  ]


def _optimizer_claims(records: list[dict]) -> list[Claim]:
  """Claim of Table 7, which is about accuracy after fine-tuning."""
  cells = _Cells(records)
  scales = {'pre-training': cells.gap('R-S Adam', 'R-S SGD', 'pre-training')}
  scales['digits, 5-shot'] = cells.gap('R-S Adam', 'R-S SGD', 'pre-training', FEWSHOT_METRIC)
  scales |= {f'fine-tuned on {name}': cells.gap('R-S Adam', 'R-S SGD', name) for name in TARGETS}
  return [Claim('Adam is better than SGD for ResNets', scales)]


def _position_claims(records: list[dict]) -> list[Claim]:
  """Claims of Table 8."""
  cells = _Cells(records)
  base = '1-D learned'
  columns = {'Stem only': steps_column(MIDDLE), 'Stem only, all steps': steps_column(ALL)}
  others = [
    (base, 'Every layer'),
    (base, 'Every layer shared'),
    *(('2-D learned', place) for place in ('Stem only', 'Every layer', 'Every layer shared')),
    ('relative', 'Stem only'),
  ]
  return [
    Claim(
      'position embeddings matter (1-D learned minus none)',
      {scale: cells.gap(base, 'none', column) for column, scale in columns.items()},
    ),
    Claim(
      'their kind and place hardly matter (minus 1-D learned in the stem, within a point)',
      {f'{row}, {at}': _minus(cells(row, at), cells(base, 'Stem only')) for row, at in others},
      small=True,
    ),
  ]


def _pooling_claims(records: list[dict]) -> list[Claim]:
  """Claims of Figure 9."""
  cells = _Cells(records)

  def gaps(row: str) -> dict[str, Differences]:
    steps = cells.steps.get(('CLS', 'CIFAR-10', 'accuracy'), {})
    others = cells.steps.get((row, 'CIFAR-10', 'accuracy'), {})
    return {
      f'{round(100 * step / max(steps))} % of the run': _minus(steps[step], others.get(step, {}))
      for step in sorted(steps)
    } or {'the run': {}}

  return [
    Claim(
      'class token and mean are equally accurate, each at its learning rate (CLS minus GAP)',
      gaps('GAP at its rate'),
      small=True,
    ),
    Claim(
      'at the learning rate of the class token the mean is worse (CLS minus GAP)',
      gaps('GAP at the rate of CLS'),
    ),
  ]


def _transfer_claims(records: list[dict]) -> list[Claim]:
  """Claims of Table 5."""
  cells = _Cells(records)
  gain = lambda model, target: _minus(
    cells(f'{model} from {ALL}', target), cells(f'{model} from {SMALLEST}', target)
  )
  models = ('ViT-S', 'R-S', 'ViT-L')
  return [
    Claim(
      f'more pre-training data transfers better (from {ALL} minus from {SMALLEST}, mean of models)',
      {target: _average(gain(model, target) for model in models) for target in TARGETS},
    ),
    Claim(
      'most of all for larger models (gain of ViT-L minus that of ViT-S)',
      {target: _minus(gain('ViT-L', target), gain('ViT-S', target)) for target in TARGETS},
    ),
  ]


def _resolution_claims(records: list[dict]) -> list[Claim]:
  """Claim of §3.2. Where the images have no more detail, resolution alone is tested."""
  cells = _Cells(records)
  scales = {}
  for model in ('ViT-S', 'R-S'):
    for before, (low, high) in RESOLUTIONS.items():
      detail = 'more detail' if high <= 32 else 'no more detail'
      for steps in (SMALLEST, MIDDLE):
        scales[f'{model}, {detail} ({low} to {high} px), {steps_column(steps)}'] = _minus(
          cells(resolution_row(before, high, steps), model),
          cells(resolution_row(before, low, steps), model),
        )
    low, high = RESOLUTIONS[32]
    scales[f'{model}, photos ({low} to {high} px)'] = _minus(
      cells(resolution_row(32, high), model), cells(resolution_row(32, low), model)
    )
  return [Claim('fine-tuning at a higher resolution helps', scales)]


def _masked_patch_claims(records: list[dict]) -> list[Claim]:
  """Claim of §4.6."""
  cells = _Cells(records)
  return [
    Claim(
      'masked patch prediction before fine-tuning improves accuracy',
      {
        column: cells.gap('masked patches first', 'from scratch', column)
        for column in (f'{images} of the labels' for images in (SMALLEST, MIDDLE))
      },
    )
  ]


MINI_CLAIMS: dict[str, Callable[[list[dict]], list[Claim]]] = {
  'data_size': _data_size_claims,
  'scaling': _scaling_claims,
  'resolution': _resolution_claims,
  'transfer': _transfer_claims,
  'pooling': _pooling_claims,
  'masked_patches': _masked_patch_claims,
  'positions': _position_claims,
  'optimizers': _optimizer_claims,
}
