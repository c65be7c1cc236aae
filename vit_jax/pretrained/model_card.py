"""The model card of a run: README.md of its repository on the Hugging Face hub.

It states what the run directory records: data, recipe, accuracy, versions, and limits. Paths of
this machine are reduced to their last part, since a card may be public.
"""

import dataclasses
import json
from pathlib import Path, PurePosixPath

from vit_jax.checkpoint.run_directory import read_run_config
from vit_jax.config import Config
from vit_jax.evaluate.statistics import wilson_interval
from vit_jax.metrics.records import read_metrics
from vit_jax.models.families import family_name
from vit_jax.pretrained.hub import HUB_PREFIX
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.runtime.files import read_json_object
from vit_jax.settings.fields import with_settings

# Format of `export_model` -> the library that reads it, as the hub names it.
LIBRARIES = {'huggingface': 'transformers', 'timm': 'timm', 'npz': 'vit_jax'}
USAGE = {
  'huggingface': (
    'from transformers import AutoImageProcessor, {auto}\n\n'
    "processor = AutoImageProcessor.from_pretrained('{name}')\n"
    "model = {auto}.from_pretrained('{name}')\n"
  ),
  'timm': "import timm\n\nmodel = timm.create_model('hf_hub:{name}', pretrained=True).eval()\n",
  'npz': '',
}
TABLE_HEAD = '| | |\n|---|---|\n'
_MEASURES = {'accuracy': 'Accuracy', 'accuracy_top5': 'Top-5 accuracy', 'loss': 'Loss'}
_BASELINES = {'linear_probe': 'Linear probe of the initial features', 'majority': 'Majority class'}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
  """The records of a run directory about its training."""

  config: Config  # Without the folders of this machine.
  data: dict  # data.json
  versions: dict
  split: str  # The name of the evaluation split, or '' if there was no evaluation.
  evaluation: dict[str, float]  # 'accuracy', 'loss', …, 'examples', and the baselines.
  step: int


def read_run_facts(workdir: Path) -> RunFacts:
  """Return the facts of a run directory. Raises UserError if a file is damaged."""
  evaluations, probes = read_metrics(workdir, 'eval'), read_metrics(workdir, 'probe')
  last = evaluations[-1] if evaluations else {'step': 0}
  names = [name for name in last if name.endswith('_examples')]
  split = names[0].removesuffix('_examples') if names else ''
  values = {}
  for record in [*probes, last] if split else []:
    values |= {
      name.removeprefix(f'{split}_'): value
      for name, value in record.items()
      if name.startswith(f'{split}_')
    }
  read = lambda name: read_json_object(workdir / name) if (workdir / name).is_file() else {}
  return RunFacts(
    config=without_folders(read_run_config(workdir)),
    data=read('data.json'),
    versions=read('versions.json'),
    split=split,
    evaluation=values,
    step=last['step'],
  )


def without_folders(config: Config) -> Config:
  """Return the config with only the last part of each path: 'folder:photos'."""
  data = config.data

  def shorten(source: str) -> str:
    kind, colon, path = source.rpartition(':')
    return f'{kind}{colon}{PurePosixPath(path).name}' if '/' in path else source

  def shorten_model(source: str) -> str:
    is_path = not source.startswith(HUB_PREFIX) and Path(source).expanduser().exists()
    return PurePosixPath(source).name if is_path else source

  return with_settings(
    config,
    {
      'data.train': shorten(data.train),
      'data.eval': shorten(data.eval),
      'data.unlabelled': shorten(data.unlabelled),
      'data.pseudo_labels': PurePosixPath(data.pseudo_labels).name,
      'data.dir': '',
      'init': shorten_model(config.init),
      'distill.teacher': shorten_model(config.distill.teacher),
    },
  )


def make_card(
  model: PretrainedModel,
  facts: RunFacts,
  name: str,
  format: str,
  *,
  command: str,
  license: str = '',
  limits: list[str] | None = None,
) -> str:
  """Return the README.md of the repository `name`, with YAML front matter.

  Args:
    model: the trained model.
    facts: what its run records.
    name: ORG/NAME.
    format: the format of the files, a key of LIBRARIES.
    command: the command that trains it.
    license: an identifier of the hub, such as 'apache-2.0'; '' states none.
    limits: sentences about what the files do not state.
  """
  parts = [
    f'---\n{card_data(model, facts, name, format, license).to_yaml()}\n---\n',
    f'# {name.partition("/")[2]}\n',
    describe_model(model, facts, format),
    f'## Use\n\n{indent(usage(model, name, format))}',
    f'## Accuracy\n\n{describe_accuracy(facts)}',
    f'## Training\n\n{describe_training(facts)}\n\n{indent(command)}',
    f'## Limits\n\n{describe_limits(model, limits or [])}',
    f'## Versions\n\n{", ".join(f"{key} {value}" for key, value in facts.versions.items())}\n',
  ]
  return '\n'.join(parts)


def card_data(model: PretrainedModel, facts: RunFacts, name: str, format: str, license: str):
  """Return the metadata of the card, a `huggingface_hub.ModelCardData`."""
  from huggingface_hub import EvalResult, ModelCardData

  task = 'image-classification' if model.classes else 'image-feature-extraction'
  source = facts.config.data.eval or facts.config.data.train
  kind, _, dataset = source.partition(':')
  optional: dict[str, object] = {'license': license} if license else {}
  if facts.config.init.startswith(HUB_PREFIX):
    optional['base_model'] = facts.config.init.removeprefix(HUB_PREFIX).partition('@')[0]
  if kind in ('tfds', 'builtin'):
    optional['datasets'] = [facts.config.data.train.partition(':')[2]]
  if 'accuracy' in facts.evaluation and model.classes:
    result = EvalResult(
      task_type=task,
      dataset_type=dataset,
      dataset_name=dataset,
      dataset_split=facts.split,
      metric_type='accuracy',
      metric_value=round(float(facts.evaluation['accuracy']), 5),
    )
    optional |= {'eval_results': [result], 'metrics': ['accuracy'], 'model_name': name}
  tags = ['jax', 'vision', 'vit-jax', family_name(model.config.variant).lower().replace(' ', '-')]
  return ModelCardData(library_name=LIBRARIES[format], pipeline_tag=task, tags=tags, **optional)


def describe_model(model: PretrainedModel, facts: RunFacts, format: str) -> str:
  """Return what the model is, in a sentence or two, and its classes."""
  c, (h, w) = model.config, model.size
  start = f', fine-tuned from {code(facts.config.init)}' if facts.config.init else ''
  layout = f'The files have the layout of {LIBRARIES[format]}.'
  if format == 'npz':
    layout = (
      'Neither transformers nor timm has an equal model. The arrays are in `model.npz`, and the '
      'config and the classes in `model.json`.'
    )
  text = (
    f'`{c.variant}` ({family_name(c.variant)}){start}, trained with vit-jax on images of {h}x{w} '
    f'pixels. {layout}\n'
  )
  if model.labels:
    names = json.dumps(list(model.labels[:100]), ensure_ascii=False)
    more = f' The first 100 of {model.classes:,} are listed.' if model.classes > 100 else ''
    text += f'\nClasses, in the order of the logits:{more}\n\n{indent(names)}'
  return text


def usage(model: PretrainedModel, name: str, format: str) -> str:
  """Return Python code that loads the model."""
  auto = 'AutoModelForImageClassification' if model.classes else 'AutoModel'
  ours = f"import vit_jax\n\nmodel = vit_jax.load('{HUB_PREFIX}{name}')\n"
  if model.classes:
    ours += "model.predict(['image.jpg'])\n"
  theirs = USAGE[format].format(name=name, auto=auto)
  return f'{theirs}\n{ours}' if theirs else ours


def describe_accuracy(facts: RunFacts) -> str:
  """Return a table of the last evaluation beside its baselines."""
  values, data = facts.evaluation, facts.config.data
  if not values:
    return 'The run has no evaluation.\n'
  source, count = data.eval or data.train, int(values['examples'])
  rows = [
    f'| {title} | {float(values[name]):.4f} |'
    for name, title in (_MEASURES | _BASELINES).items()
    if name in values
  ]
  where = f'{code(source)}, split {code(facts.split)}'
  text = f'After step {facts.step:,}, on {count:,} examples of {where}:\n\n{TABLE_HEAD}'
  text += '\n'.join(rows) + '\n'
  if 'accuracy' in values and count:
    low, high = wilson_interval(round(float(values['accuracy']) * count), count)
    text += f'\nThe 95 % confidence interval of the accuracy is {low:.2%} to {high:.2%}.\n'
  return text


def describe_training(facts: RunFacts) -> str:
  """Return a table of data and recipe."""
  config, optim, data = facts.config, facts.config.optim, facts.config.data
  examples = facts.data.get('train.examples')
  rows = {
    'Data': f'{code(data.train)}, split {code(data.split)}'
    + (f', {examples:,} images' if examples else ''),
    'Length': f'{facts.step:,} steps of {data.batch:,} images',
    'Optimizer': f'{optim.name}, learning rate {optim.lr:g}, weight decay {optim.weight_decay:g}',
    'Schedule': f'{optim.schedule}, warm-up {optim.warmup}',
    'Loss': config.loss,
    'Preprocessing': f'{data.size[0]}x{data.size[1]} pixels, {data.interpolation}',
    'Seed': f'{config.seed}',
  }
  return TABLE_HEAD + '\n'.join(f'| {key} | {value} |' for key, value in rows.items())


def describe_limits(model: PretrainedModel, limits: list[str]) -> str:
  """Return a list of what a user must not expect."""
  lines = ['The model was evaluated only on the data above; accuracies on other data may differ.']
  if model.classes and model.loss == 'softmax':
    lines.append(
      f'Every image gets one of the {model.classes:,} classes, also if none of them fits.'
    )
  lines += limits
  lines.append('This card was generated from the records of the run. It has not been reviewed.')
  return '\n'.join(f'- {line}' for line in lines) + '\n'


def indent(text: str) -> str:
  """Return text as an indented code block, which no character in it can end."""
  return ''.join(f'    {line}'.rstrip() + '\n' for line in text.strip('\n').split('\n'))


def code(text: str) -> str:
  """Return text of a user as inline code, which no character in it can end."""
  plain = text.replace('`', "'").replace('|', '/')
  return f'`{plain}`'
