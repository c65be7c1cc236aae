"""The summary of a run: sentences, final numbers beside baselines, and comparisons."""

import jax

from vit_jax.config import Config
from vit_jax.data.preprocessing import describe_sizes
from vit_jax.metrics.goodput import Goodput
from vit_jax.models.families import family_name, with_article
from vit_jax.optim.sharpness import forward_passes
from vit_jax.report.classes import Predictions
from vit_jax.report.run_facts import BASELINE_NAMES, RunFacts
from vit_jax.settings.fields import flatten_config
from vit_jax.training.program import training_flops

_STATISTICS = {  # Names in the JSON of `evaluate` -> names on the page.
  'macro_f1': 'macro F1',
  'mean_average_precision': 'mAP',
  'expected_calibration_error': 'ECE',
}


def describe_run(run: RunFacts, model=None) -> list[str]:
  """Return sentences about model, data, recipe and time. `model` is loaded, or None."""
  config, data, optim = run.config, run.config.data, run.config.optim
  count = ''
  if model is not None:
    count = f' with {sum(leaf.size for leaf in jax.tree.leaves(model.params)):,} parameters'
  origin = f'fine-tuned from {config.init}' if config.init else 'trained from random parameters'
  family = with_article(family_name(config.model.variant))
  classes = f'{len(run.labels):,} classes' if run.labels else 'no classes'
  return [
    f'{config.model.variant}, {family}{count}, {origin} on {data.train} {data.split} ({classes}) '
    f'at {describe_sizes(data)}.',
    f'{run.last_step:,} steps of {data.batch:,} images with {optim.name}, learning rate '
    f'{optim.lr:g}, loss {config.loss}'
    + describe_regularization(config)
    + (f' and the predictions of {config.distill.teacher}' if config.distill.teacher else '')
    + f'. The steps took {format_seconds(run.seconds)}, without evaluation and saving'
    + _speed(run)
    + '.',
    *_describe_cost(run, model),
    *_describe_goodput(run.goodput),
  ]


def _describe_goodput(goodput: Goodput | None) -> list[str]:
  """Return a sentence about the run's whole life, or none for runs that do not record it."""
  if goodput is None or not goodput.life:
    return []
  starts = f'{goodput.starts} starts' if goodput.starts > 1 else '1 start'
  repeated = ''
  if goodput.repeated:
    repeated = f', and {format_seconds(goodput.repeated)} on steps that a start repeated'
  return [
    f'Goodput {goodput.share:.1%}: of {format_seconds(goodput.life)} since the first start, with '
    f'{starts}, the run spent {format_seconds(goodput.new)} on new steps{repeated}.'
  ]


def describe_regularization(config: Config) -> str:
  """Return ', with RandAugment …, mixup 0.2' for what is on, or ''."""
  data, optim = config.data, config.optim
  rule = f'GSAM {optim.sam_rho:g} with alpha {optim.gsam_alpha:g}' if optim.gsam_alpha else ''
  named = {
    f'RandAugment {data.randaug_variant} with {data.randaug_ops} operations at magnitude '
    f'{data.randaug_magnitude:g}': data.randaug_ops,
    '3-Augment': data.three_augment,
    f'color jitter {data.color_jitter:g}': data.color_jitter,
    f'random erasing {data.random_erasing:g}': data.random_erasing,
    f'{data.repeats} copies of each image': data.repeats > 1,
    f'mixup {config.mixup:g}': config.mixup,
    f'CutMix {config.cutmix:g}': config.cutmix,
    rule or f'SAM {optim.sam_rho:g}': optim.sam_rho,
  }
  names = [name for name, is_on in named.items() if is_on]
  return f', with {", ".join(names)}' if names else ''


def _describe_cost(run: RunFacts, model) -> list[str]:
  """Return a sentence about device time and floating-point operations, or none without a model."""
  if model is None or not run.last_step:
    return []
  config, devices = run.config, run.versions.get('devices', '')
  passes = forward_passes(config.optim)
  taught = next((each['forward_flops'] for each in run.records if each['kind'] == 'teacher'), 0)
  images = config.data.batch * run.last_step
  # The records have the teacher's FLOPs: its file may be gone.
  flops = training_flops(config, model.model, images, None) + taught * images
  operations = f'about {flops:.2g} floating-point operations, {passes} forward passes an image'
  operations += ' and one of the teacher' if taught else ''
  if not devices:  # Runs of older versions do not record them.
    return [f'This took {operations}.']
  hours = run.seconds * int(devices.partition(' ')[0]) / 3600
  return [f'This took {hours:.3g} device-hours ({devices}) and {operations}.']


def describe_result(
  predictions: Predictions | None, split: str, baselines: dict[str, float]
) -> list[str]:
  """Return a sentence about the accuracy beside the baselines, or none without predictions."""
  if predictions is None or not predictions.examples:
    return []
  words = [
    f'Of {predictions.examples:,} images of the split {split or "of the evaluation"}, '
    f'{predictions.accuracy:.2%} are classified correctly'
  ]
  words += [f'{name}: {value:.2%}' for name, value in baselines.items()]
  return ['; '.join(words) + '.']


def _speed(run: RunFacts) -> str:
  speeds = [r['images_per_second'] for r in run.records if 'images_per_second' in r]
  return f', at last {speeds[-1]:,.0f} images per second' if speeds else ''


def run_numbers(
  run: RunFacts, predictions: Predictions | None, baselines: dict[str, float]
) -> list[tuple[str, str]]:
  """Return (name, value) of the last evaluation and of what it is compared with."""
  evaluation = {n: v for n, v in run.last_evaluation.items() if n not in ('step', 'kind')}
  numbers = [
    (name.replace('_', ' '), format_number(name, value)) for name, value in evaluation.items()
  ]
  places = [(name, format_number('accuracy', value)) for name, value in baselines.items()]
  statistics = predictions.statistics if predictions else {}
  more = [
    (title, f'{statistics[name]:.2%}') for name, title in _STATISTICS.items() if name in statistics
  ]
  if 'accuracy_low' in statistics:
    interval = f'{statistics["accuracy_low"]:.1%} to {statistics["accuracy_high"]:.1%}'
    more.insert(0, ('95 % interval', interval))
  return numbers[:1] + places + more + numbers[1:]


def describe_evaluation(model, facts: dict) -> list[str]:
  """Return sentences about the evaluation of a `PretrainedModel`. `facts` are its JSON."""
  count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
  size = 'x'.join(map(str, model.size))
  return [
    f'{model.config.variant} with {count:,} parameters, evaluated on {facts["examples"]:,} images '
    f'of {facts["classes"]:,} classes at {size} pixels, {facts["images_per_second"]:,.0f} images '
    'per second.'
  ]


def evaluation_numbers(facts: dict) -> list[tuple[str, str]]:
  """Return (name, value) for the facts of an evaluation."""
  numbers = [('accuracy', f'{facts["accuracy"]:.2%}')]
  if 'expected_accuracy' in facts:
    numbers.append(('published accuracy', f'{facts["expected_accuracy"]:.2%}'))
  numbers.append(('95 % interval', f'{facts["accuracy_low"]:.1%} to {facts["accuracy_high"]:.1%}'))
  numbers += [(title, f'{facts[name]:.2%}') for name, title in _STATISTICS.items() if name in facts]
  return [
    *numbers,
    ('accuracy top5', f'{facts["accuracy_top5"]:.2%}'),
    ('loss', f'{facts["loss"]:.4f}'),
    ('examples', f'{facts["examples"]:,}'),
  ]


def differing_settings(runs: list[RunFacts]) -> list[tuple[str, list[str]]]:
  """Return (setting, its value in each run) for the settings that differ between runs."""
  flat = [flatten_config(run.config) for run in runs]
  return [
    (name, [str(each[name]) for each in flat])
    for name in flat[0]
    if len({str(each[name]) for each in flat}) > 1
  ]


def final_numbers(runs: list[RunFacts]) -> list[tuple[str, list[str]]]:
  """Return (metric, its last value in each run) for evaluations, baselines, loss and time."""
  columns = []
  for run in runs:
    values = {name: v for name, v in run.last_evaluation.items() if name not in ('step', 'kind')}
    loss = next((r['loss'] for r in reversed(run.records) if 'loss' in r), None)
    values |= {'training loss': loss, **run.baselines, 'steps': run.last_step}
    columns.append(values | {'training time': format_seconds(run.seconds)})
  names = dict.fromkeys(name for values in columns for name in values)
  return [(name, [format_number(name, values.get(name)) for values in columns]) for name in names]


def format_number(name: str, value) -> str:
  """Return a value as text: accuracies in percent, a dash if there is none."""
  if value is None:
    return '-'
  if isinstance(value, float) and ('accuracy' in name or name in BASELINE_NAMES.values()):
    return f'{value:.2%}'
  if isinstance(value, int):
    return f'{value:,}'
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def format_seconds(seconds: float) -> str:
  """Return a time such as '45 s', '3 min 20 s' or '2 h 5 min'."""
  minutes, rest = divmod(round(seconds), 60)
  if not minutes:
    return f'{rest} s'
  return f'{minutes} min {rest} s' if minutes < 60 else f'{minutes // 60} h {minutes % 60} min'
