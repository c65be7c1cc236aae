"""What the commands of python -m vit_jax do: predict, evaluate and export a pre-trained model, plan a run."""

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from vit_jax.config import DataConfig
from vit_jax.entry import keep_compiled_programs, read_config
from vit_jax.errors import UserError
from vit_jax.pretrained.model import Pretrained
from vit_jax.pretrained.released import load

FORMATS = {'.npz': 'npz', '.onnx': 'onnx', '.stablehlo': 'stablehlo'}  # By the suffix of a file.


def open_model(args, *, overrides: tuple[str, ...]) -> Pretrained:
  """What --init names, with what was assumed of it said on stderr."""
  keep_compiled_programs()
  model = load(args.init, **{name: getattr(args, name) for name in overrides})
  for note in model.notes:
    print(f'{model.source}: {note}', file=sys.stderr)
  return model


def predict(args, overrides: tuple[str, ...]):
  """The most probable classes of each image, as a table, JSON or CSV."""
  from vit_jax.evaluate.predict import find_images, predictions

  paths = find_images(args.images)
  if args.top < 1 or args.batch < 1:
    raise UserError(f'--top={args.top} --batch={args.batch}: expected numbers from 1')
  model = open_model(args, overrides=overrides)
  found = predictions(model, paths, top=args.top, batch=args.batch)
  found = list(tqdm(found, total=len(paths), unit=' images', disable=len(paths) < 2 * args.batch or not sys.stderr.isatty()))
  if args.json:
    write(args.json, json.dumps([as_json(prediction) for prediction in found], indent=2, ensure_ascii=False) + '\n')
  if args.csv:
    write_csv(args.csv, found)
  if not args.json and not args.csv:
    width = max(len(prediction.path) for prediction in found)
    for prediction in found:
      pairs = zip(prediction.labels, prediction.probabilities, strict=True)
      words = '  '.join(f'{label} {100 * probability:.1f} %' for label, probability in pairs)
      print(f'{prediction.path:{width}}  {words or "error: " + prediction.error}')
  bad = [prediction for prediction in found if prediction.error]
  for prediction in bad:
    print(f'error: {prediction.path}: {prediction.error}', file=sys.stderr)
  if bad:
    sys.exit(1)


def as_json(prediction) -> dict:
  """One object of the list."""
  if prediction.error:
    return {'path': prediction.path, 'error': prediction.error}
  pairs = zip(prediction.labels, prediction.probabilities, strict=True)
  return {'path': prediction.path, 'classes': [{'label': label, 'probability': p} for label, p in pairs]}


def write_csv(to: str, found: Iterable):
  """A line for each image and class: path, rank, label, probability, error."""
  lines = [('path', 'rank', 'label', 'probability', 'error')]
  for prediction in found:
    pairs = zip(prediction.labels, prediction.probabilities, strict=True)
    lines += [(prediction.path, i + 1, label, f'{p:.6f}', '') for i, (label, p) in enumerate(pairs)]
    lines += [(prediction.path, '', '', '', prediction.error)] if prediction.error else []
  if to == '-':
    csv.writer(sys.stdout, lineterminator='\n').writerows(lines)
    return
  try:
    with Path(to).open('w', newline='') as file:
      csv.writer(file, lineterminator='\n').writerows(lines)
  except OSError as error:
    raise UserError(f'can not write {to}: {error.strerror}') from None


def write(to: str, text: str):
  """To a file, or '-' for the screen."""
  if to == '-':
    sys.stdout.write(text)
    return
  try:
    Path(to).write_text(text)
  except OSError as error:
    raise UserError(f'can not write {to}: {error.strerror}') from None


def evaluate(args, overrides: tuple[str, ...]):
  """Exact accuracy on a whole split of a data set."""
  from vit_jax.data.sources import open_source
  from vit_jax.evaluate import report

  source = open_source(args.data, args.split, dir=args.dir)
  own = load(args.init).preprocessing if any(getattr(args, name) is not None for name in overrides) else None
  model = open_model(args, overrides=overrides)
  model.refuse_no_head()
  how = model.preprocessing
  for line in report.differences(how, own) if own else ():
    print(f'warning: {line}, which is how {model.source} was made', file=sys.stderr)
  if said := report.match_classes(model, source)[1]:
    print(said, file=sys.stderr)
  data = DataConfig(
    eval_batch=args.batch,
    size=model.size,
    eval_crop=how['crop'],
    eval_short_side=how['short_side'],
    workers=args.workers,
    threads=args.threads,
  )
  done = report.evaluate(model, source, data)
  names = model.labels or tuple(f'class {i}' for i in range(model.classes))
  if args.per_class:
    write(args.per_class, report.per_class(done, names))
  if args.confusion:
    report.draw_confusion(done, names, Path(args.confusion))
  result = done.result | {'images_per_second': round(done.result['examples'] / done.seconds, 1)}
  if args.json:
    write(args.json, json.dumps(result, indent=2) + '\n')
  words = [f'{name} {value:.4f}' if isinstance(value, float) else f'{name} {value:,}' for name, value in done.result.items()]
  print(f'{model.source} on {args.data} {source.split}: ' + '  '.join(words) + f'  ({result["images_per_second"]:g} images/s)')
  if model.accuracy is not None and (model.classes, len(source)) == (1000, 50_000):
    got = 100 * done.result['accuracy']
    print(f'expected {model.accuracy:g} ({model.accuracy_from}), got {got:.3f}: {got - model.accuracy:+.3f}')


def export(args, overrides: tuple[str, ...]):
  """The model in another format, read again and compared."""
  from vit_jax.pretrained.export import export

  format = args.format or FORMATS.get(Path(args.to).suffix)
  if format is None:
    raise UserError(f'--to={args.to}: say which --format: npz, timm, huggingface, onnx or stablehlo')
  for line in export(open_model(args, overrides=overrides), Path(args.to), format):
    print(line)


def plan(args):
  """Whether a run fits a TPU slice, and how long it would take."""
  # No TPU is here, no metadata server to ask for one, and libtpu need not say so at length.
  os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true'}
  os.environ |= {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3'}
  from vit_jax.cloud.plan import describe, plan
  from vit_jax.cloud.topologies import topology

  where = topology(args.topology, args.slices)
  config = read_config(args.more)
  print(f'compiling for {where.chips} chips of {where.name} …', file=sys.stderr, flush=True)
  found, hlo = plan(config, where)
  if args.hlo and hlo:
    write(args.hlo, hlo)
  if args.json:
    facts = dataclasses.asdict(found) | {'seconds_per_step': found.seconds_per_step, 'mfu': found.mfu}
    write(args.json, json.dumps(facts, indent=2) + '\n')
  print('\n'.join(describe(config, found)))
  if not found.fits:
    sys.exit(1)
