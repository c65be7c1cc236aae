"""Put the sections of a page together: for a run, for an evaluation, and for several runs."""

import contextlib
import dataclasses
import importlib.metadata
import platform
from pathlib import Path

import numpy as np

from vit_jax.checkpoint.run_directory import read_run_preprocessing
from vit_jax.config import DataConfig
from vit_jax.data.loader import train_batches
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError, one_line
from vit_jax.evaluate.classify import ClassificationResult, evaluate_split, summarize_rows
from vit_jax.evaluate.evaluator import make_pretrained_evaluator
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.evaluate.predictions import load_predictions
from vit_jax.pretrained.loading import load
from vit_jax.report.attention import MAX_IMAGES, analyze_attention
from vit_jax.report.charts import draw_attention_distance, draw_calibration, draw_curves
from vit_jax.report.classes import SHOWN_EXAMPLES, summarize_predictions
from vit_jax.report.page import ComparisonTable, Report
from vit_jax.report.run_facts import BASELINE_NAMES, RunFacts, equivalent_command, read_run
from vit_jax.report.summary import (
  describe_evaluation,
  describe_result,
  describe_run,
  differing_settings,
  evaluation_numbers,
  final_numbers,
  run_numbers,
)
from vit_jax.report.thumbnails import ChosenExamples, encode_image, read_images

MAX_EVALUATED = 5000  # Examples, where the page has to evaluate the model itself.
_PICTURE_SIDE = 128  # Pixels.


def report_run(workdir: Path, *, with_model: bool = True) -> Report:
  """Return the page of the run in `workdir`.

  Without the model, the page has no attention, and predictions only if the run has saved them.
  Raises UserError if `workdir` is not a run directory.
  """
  run, notes = read_run(workdir), []
  model = source = None
  if with_model:
    with _note_errors(notes, 'The model cannot be loaded'):
      model = load(str(workdir))
  with _note_errors(notes, 'The evaluation data cannot be read, so that images are missing'):
    data = run.config.data
    source = open_source(data.eval or data.train, data.eval_split, dir=data.dir)
  result = None
  if not run.config.mask.target:
    result = _read_predictions(run) or _evaluate(run, model, source, notes)
  predictions = result and summarize_predictions(result, run.labels, run.config.loss)
  split, baselines = source.split if source else '', _baselines(run, result)
  report = Report(
    title=run.name,
    sentences=describe_run(run, model) + describe_result(predictions, split, baselines),
    numbers=run_numbers(run, predictions, baselines),
    command=equivalent_command(run.config),
    versions=run.versions,
    warnings=run.warnings,
    notes=notes,
    curves=draw_curves({run.name: run.records}),
    predictions=predictions,
    split=split,
    calibration=result and _draw_calibration(result),
  )
  steps = read_run_preprocessing(workdir)
  with _note_errors(notes, 'Some images cannot be read'):
    report = _add_images(report, source, run.config.data, steps)
  with _note_errors(notes, 'There is no augmented batch'):
    report = dataclasses.replace(report, batch=_read_batch(run))
  with _note_errors(notes, 'There is no attention'):
    return _add_attention(report, model, source)
  return report


def report_evaluation(model, source, result: ClassificationResult, facts: dict) -> Report:
  """Return the page of an evaluation of a `PretrainedModel`. `facts` are its JSON."""
  predictions, notes = summarize_predictions(result, source.label_names, model.loss), []
  packages = ('vit-jax', 'jax', 'flax', 'numpy')
  versions = {name: _package_version(name) for name in packages}
  report = Report(
    title=f'{facts["model"]} on {facts["data"]} {source.split}',
    sentences=describe_evaluation(model, facts),
    numbers=evaluation_numbers(facts),
    versions=versions | {'python': platform.python_version()},
    warnings=list(facts.get('notes', ())),
    notes=notes,
    predictions=predictions,
    split=source.split,
    calibration=_draw_calibration(result),
  )
  with _note_errors(notes, 'Some images cannot be read'):
    data = eval_data_config(model, batch=1)
    report = _add_images(report, source, data, model.preprocessing)
  with _note_errors(notes, 'There is no attention'):
    return _add_attention(report, model, source)
  return report


def report_comparison(workdirs: list[Path]) -> Report:
  """Return the page that shows several runs side by side."""
  runs = [read_run(workdir) for workdir in workdirs]
  names = _distinct_names(runs)
  warnings = [
    f'{name}: {warning}' for name, run in zip(names, runs, strict=True) for warning in run.warnings
  ]
  return Report(
    title=f'{len(runs)} runs',
    sentences=[f'{name}: {describe_run(run)[0]}' for name, run in zip(names, runs, strict=True)],
    warnings=warnings,
    comparison=[
      ComparisonTable(caption=caption, heading=heading, columns=names, rows=rows)
      for caption, heading, rows in (
        ('Settings that differ', 'setting', differing_settings(runs)),
        ('Last numbers', 'number', final_numbers(runs)),
      )
    ],
    curves=draw_curves({name: run.records for name, run in zip(names, runs, strict=True)}),
  )


@contextlib.contextmanager
def _note_errors(notes: list[str], what: str):
  """Turn an error inside the context into a note on the page."""
  try:
    yield
  except (UserError, OSError, MemoryError) as error:
    notes.append(f'{what}: {one_line(error)}')


def _read_predictions(run: RunFacts) -> ClassificationResult | None:
  """Return the result that the run saved for its last evaluation, if it did."""
  rows = load_predictions(run.workdir, run.last_evaluation.get('step', -1))
  return rows and summarize_rows(rows, np.arange(len(run.labels)), seconds=np.inf)


def _evaluate(run: RunFacts, model, source, notes: list[str]) -> ClassificationResult | None:
  """Return the result on at most MAX_EVALUATED examples, or None without a model or data."""
  if model is None or source is None or not model.classes:
    return None
  if len(source) > MAX_EVALUATED:
    notes.append(
      f'The numbers about classes are of {MAX_EVALUATED:,} of {len(source):,} images, evenly '
      'spaced.'
    )
  data = dataclasses.replace(run.config.data, eval_batch=64, bad_images='skip')
  evaluator, params = make_pretrained_evaluator(model, data)
  chosen = source.subsample(MAX_EVALUATED)
  result = evaluate_split(
    evaluator, params, chosen, loss=model.loss, logit_indices=np.arange(model.classes)
  )
  indices = np.linspace(0, len(source) - 1, len(chosen)).astype(int)  # As `subsample` chooses.
  return dataclasses.replace(result, places=indices[result.places])


def _baselines(run: RunFacts, result: ClassificationResult | None) -> dict[str, float]:
  """Return the recorded baselines, and the accuracy of the most frequent training class."""
  name, data = BASELINE_NAMES['majority'], run.config.data
  if name in run.baselines or result is None or not result.examples:
    return run.baselines
  try:
    counts = open_source(data.train, data.split, dir=data.dir).class_counts()
  except UserError:
    return run.baselines
  if counts is None:
    return run.baselines
  return run.baselines | {name: float((result.labels == counts.argmax()).any(axis=1).mean())}


def _draw_calibration(result: ClassificationResult):
  correct = (result.labels == result.predictions[:, None]).any(axis=1)
  return draw_calibration(result.confidence, correct)


def _add_images(report: Report, source, data: DataConfig, steps: Preprocessing) -> Report:
  """Return the report with the images that its predictions show."""
  if source is None or report.predictions is None or not report.predictions.places:
    return report
  places = report.predictions.places
  chosen = ChosenExamples(source, tuple(places))
  images = read_images(chosen, data, steps)
  return dataclasses.replace(
    report,
    pictures={
      place: encode_image(image, _PICTURE_SIDE) for place, image in zip(places, images, strict=True)
    },
    file_names=_example_names(source, places),
  )


def _example_names(source, places: list[int]) -> dict[int, str]:
  """Return the name of each example: of a file of the user, the file and its folder."""
  names = {place: str(source[place][2]) for place in places}
  return {
    place: '/'.join(Path(name).parts[-2:]) if source.is_user_file(place) else name
    for place, name in names.items()
  }


def _read_batch(run: RunFacts) -> list[tuple[str, str]]:
  """Return augmented images of the labelled data of the run, and their labels."""
  data = dataclasses.replace(
    run.config.data, batch=SHOWN_EXAMPLES, unlabelled='', bad_images='skip', workers=0, repeats=1
  )
  source = open_source(data.train, data.split, dir=data.dir)
  batches = train_batches(
    source, data, seed=run.config.seed, start=0, host=0, hosts=1, model=run.config.model
  )
  batch = next(batches)
  named = lambda labels: ', '.join(source.label_names[label] for label in labels if label >= 0)
  return [
    (encode_image(image, _PICTURE_SIDE), named(labels))
    for image, labels, readable in zip(batch['image'], batch['label'], batch['mask'], strict=True)
    if readable
  ]


def _add_attention(report: Report, model, source) -> Report:
  """Return the report with the attention of the model on some images of the source."""
  if model is None or source is None:
    return report
  # The second halves of equal parts: one image of each class where there are few.
  count = min(MAX_IMAGES, len(source))
  places = [int((i + 0.5) * len(source) / count) for i in range(count)]
  examples = [source[place] for place in places]
  names = [', '.join(source.label_names[i] for i in labels) for _, labels, _ in examples]
  captions = [f'{i}: {name}' for i, name in enumerate(names, start=1)]
  section = analyze_attention(model, ChosenExamples(source, tuple(places)), captions)
  if section is None:
    return report
  distance = draw_attention_distance(section.distances)
  return dataclasses.replace(report, attention=section, distance=distance)


def _distinct_names(runs: list[RunFacts]) -> list[str]:
  """Return the names of the runs' directories, or their paths where names are equal."""
  names = [run.name for run in runs]
  if len(set(names)) == len(names):
    return names
  return [str(run.workdir) for run in runs]


def _package_version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:  # A checkout.
    return 'unknown'
