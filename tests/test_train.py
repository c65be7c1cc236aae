"""The training loop, end to end on real digits.

The tests cover resuming, one compilation, exact evaluation, fine-tuning, and errors.
"""

import dataclasses
import json
import re
import shutil

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import simplejpeg

import vit_jax
from vit_jax.checkpoint.manager import load_newest_params
from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.data.sampler import shuffled_example
from vit_jax.errors import DivergedError, UserError
from vit_jax.metrics.records import read_metrics
from vit_jax.train import train

# It uses every random draw, so that a repeated or missing step changes the result.
CONFIG = Config(
  data=DataConfig(train='builtin:digits', batch=16, eval_batch=48, size=(8, 8)),
  model=ModelConfig(variant='mu/4', depth=2, dropout=0.1, drop_path=0.1),
  optim=OptimConfig(lr=1e-2, warmup='2', weight_decay=0.1, grad_clip_norm=1.0, ema=0.9),
  mixup=0.2,
  steps=12,
  log_ids=True,
  log_every='1',
  eval_every='0',
  save_every='1',
  max_to_keep=12,
)


def changed(config=CONFIG, **kwargs):
  """Return the config with some settings replaced; `data__batch` names data.batch."""
  for name, value in kwargs.items():
    group, _, field = name.rpartition('__')
    replaced = dataclasses.replace(getattr(config, group), **{field: value}) if group else value
    config = dataclasses.replace(config, **{group or field: replaced})
  return config


def losses(workdir):
  return [
    (record['step'], record['loss'].hex()) for record in read_metrics(workdir) if 'loss' in record
  ]


def bits(workdir):
  return {
    name: leaf.tobytes()
    for name, leaf in flax.traverse_util.flatten_dict(
      load_newest_params(workdir)[0], sep='/'
    ).items()
  }


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run') / 'uninterrupted'
  compilations = []
  note = lambda event, seconds, **kwargs: (
    compilations.append(kwargs.get('fun_name')) if 'backend_compile' in event else None
  )
  jax.monitoring.register_event_duration_secs_listener(note)
  result = train(CONFIG, workdir)
  jax.monitoring.unregister_event_duration_listener(note)
  return workdir, result, compilations


@pytest.mark.parametrize('stop', range(1, 13))
def test_a_run_stopped_after_any_step_ends_bit_for_bit_the_same(uninterrupted, tmp_path, stop):
  full, result, _ = uninterrupted
  shutil.copytree(
    full, tmp_path / 'run', ignore=shutil.ignore_patterns(*map(str, range(stop + 1, 13)))
  )
  assert train(CONFIG, tmp_path / 'run') == result
  assert bits(tmp_path / 'run') == bits(full)
  assert losses(tmp_path / 'run') == losses(full)
  assert (tmp_path / 'run' / 'ids.jsonl').read_text(encoding='utf-8') == (
    full / 'ids.jsonl'
  ).read_text(encoding='utf-8')


DAMAGED_LOGS = {
  'deleted': lambda text: None,
  'emptied': lambda text: '',
  'cut short': lambda text: text[: len(text) // 2],
  'garbage in the middle': lambda text: text[:200] + '\0garbage\n{"step": 4\n' + text[200:],
  "another run's": lambda text: text.replace('"step": 5', '"step": 6').replace('not_finite', 'x'),
}


@pytest.mark.parametrize('damage', DAMAGED_LOGS)
def test_deleted_or_damaged_logs_do_not_change_how_a_run_resumes(uninterrupted, tmp_path, damage):
  full, result, _ = uninterrupted
  later = shutil.ignore_patterns(*map(str, range(6, 13)))
  shutil.copytree(full, tmp_path / 'run', ignore=later)
  for name in ('metrics.jsonl', 'ids.jsonl'):
    path = tmp_path / 'run' / name
    text = DAMAGED_LOGS[damage](path.read_text(encoding='utf-8'))
    path.unlink() if text is None else path.write_text(text, encoding='utf-8')
  assert train(CONFIG, tmp_path / 'run') == result
  assert bits(tmp_path / 'run') == bits(full)
  assert losses(tmp_path / 'run')[-7:] == losses(full)[-7:]


def test_a_complete_run_without_its_logs_returns_its_last_evaluation(uninterrupted, tmp_path):
  full, result, _ = uninterrupted
  shutil.copytree(full, tmp_path / 'run', ignore=shutil.ignore_patterns('*.jsonl'))
  assert train(CONFIG, tmp_path / 'run') == result


def test_the_examples_of_each_step_are_those_of_the_stream(uninterrupted):
  lines = [
    json.loads(line)
    for line in (uninterrupted[0] / 'ids.jsonl').read_text(encoding='utf-8').splitlines()
  ]
  assert [line['step'] for line in lines] == list(range(1, 13))
  assert [line['ids'] for line in lines] == [
    [shuffled_example(16 * k + i, 1297, 0)[1] for i in range(16)] for k in range(12)
  ]
  assert [(line['step'], line['loss']) for line in lines] == losses(uninterrupted[0])


def test_the_step_is_compiled_once(uninterrupted):
  _, _, compilations = uninterrupted
  assert compilations.count('jit(train_step)') == 1
  assert compilations.count('jit(evaluate_batch)') == 1


def test_every_example_is_evaluated(uninterrupted):
  _, result, _ = uninterrupted
  assert result['test_examples'] == 500  # Not a multiple of 48, nor of 8.
  assert {'step', 'test_accuracy', 'test_accuracy_top5', 'test_loss', 'test_examples'} == set(
    result
  )
  assert result['test_accuracy'] * 500 == pytest.approx(round(result['test_accuracy'] * 500))


def test_a_run_directory_has_the_documented_files(uninterrupted):
  full, _, _ = uninterrupted
  left = {path.name for path in full.iterdir()}
  assert left == {
    'config.json', 'preprocessing.json', 'labels.txt', 'data.json', 'versions.json',
    'metrics.jsonl', 'goodput.jsonl', 'ids.jsonl', 'tensorboard', 'checkpoints', 'curves.png',
    'predictions.npz', '.lock',
  }  # fmt: skip
  first = read_metrics(full)[0]
  assert {'step', 'loss', 'lr', 'images_per_second'} <= set(first)
  assert (full / 'labels.txt').read_text(encoding='utf-8').split() == [
    str(digit) for digit in range(10)
  ]


def test_parameters_and_optimizer_state_over_fsdp_give_the_same_losses(uninterrupted, tmp_path):
  train(changed(mesh__fsdp=4), tmp_path / 'run')
  got, expected = (
    np.array([float.fromhex(loss) for _, loss in losses(w)])
    for w in (tmp_path / 'run', uninterrupted[0])
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_fine_tuning_starts_from_a_run_at_another_resolution_on_another_task(
  tmp_path, uninterrupted, capsys
):
  config = changed(
    data__train='builtin:fashion_mnist',
    data__size=(12, 8),
    data__batch=64,
    init=str(uninterrupted[0]),
    steps=2,
  )
  config = changed(config, optim__warmup='0')
  train(config, tmp_path / 'run')
  printed = capsys.readouterr().err
  assert re.search(r'pos_embedding +resampled +\[1, 5, 32\] -> \[1, 7, 32\]', printed)
  assert re.search(r'head/kernel +new +\[32, 10\] -> \[32, 10\]', printed)
  assert re.search(r'\d+ arrays kept', printed)
  assert f'starts from {uninterrupted[0]} at step 12' in printed


def test_the_loaded_parameters_are_the_ones_that_training_starts_from(tmp_path, uninterrupted):
  config = changed(
    init=str(uninterrupted[0]), steps=1, optim__warmup='0', optim__lr=0.0, optim__ema=0.0
  )
  train(config, tmp_path / 'run')
  old, new = bits(uninterrupted[0]), bits(tmp_path / 'run')
  assert {name for name in old if old[name] != new[name]} == {'head/kernel', 'head/bias'}


REFUSED = {
  'pixels normalised '
  'otherwise': ({'init': 'RUN', 'model__mean': (1.0, 2.0, 3.0)}, '--config.model.mean=127.5,127.5'),
  'another GELU': ({'init': 'RUN', 'model__gelu': 'erf'}, 'add --config.model.gelu=tanh$'),
  'another architecture': ({'init': 'RUN', 'model__mlp': 64}, r'not fit .*\[2, 32, 128\] in the '
                                                              r'file, \[2, 32, 64\]'),
  'nothing to start from': ({'init': 'RUN/nothing-*'}, 'nothing-'),
  'a batch that does not divide': ({'data__batch': 20}, 'config.data.batch=20 '),
  'warm-up that is too '
  'long': ({'optim__warmup': '12'}, r'warmup \(12\) and cooldown \(0\) leave nothing of 12 steps'),
  'an unknown split': ({'data__eval_split': 'tset'}, "no split 'tset'"),
  'classes that differ': ({'data__eval': 'builtin:fashion_mnist'}, 'different classes'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_incompatible_settings_are_refused_before_anything_is_written(
  uninterrupted, tmp_path, case
):
  settings, message = REFUSED[case]
  settings = {
    name: value.replace('RUN', str(uninterrupted[0])) if isinstance(value, str) else value
    for name, value in settings.items()
  }
  with pytest.raises(UserError, match=message) as error:
    train(changed(**settings), tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_directory_with_another_run_is_refused_and_not_changed(uninterrupted, tmp_path):
  shutil.copytree(uninterrupted[0], tmp_path / 'run')
  before = (tmp_path / 'run' / 'config.json').read_text(encoding='utf-8')
  with pytest.raises(UserError, match=r'differ in optim.lr: 0.01 there, 0.5 here$'):
    train(changed(optim__lr=0.5), tmp_path / 'run')
  assert (tmp_path / 'run' / 'config.json').read_text(encoding='utf-8') == before


OTHER_DATA = {
  # Change -> (settings or recorded facts, text of the error).
  'the seed': ({'seed': 1}, 'seed: 0 there, 1 here'),
  'the batch': ({'data__batch': 24}, 'data.batch: 16 there, 24 here'),
  'the split': ({'data__split': 'train[:1290]'}, 'data.split: train there'),
  'the split to evaluate on': ({'data__eval_split': 'test[:400]'}, 'data.eval_split:  there'),
  'the crop': ({'data__crop_area': (0.1, 1.0)}, 'data.crop_area'),
  'the flip': ({'data__flip': False}, 'data.flip: True there, False here'),
  'mixup': ({'mixup': 0.3}, 'mixup: 0.2 there, 0.3 here'),
  'the number of examples': ({'train.examples': 1298}, 'train.examples: 1298 there, 1297 here'),
  'the list of examples': ({'train.listing': 'other'}, 'train.listing: other there'),
  'the content of examples': ({'eval.content': 'other'}, 'eval.content: other there'),
  'the version of the order': ({'order': 0}, 'order: 0 there, 1 here'),
  'the version of the augmentation': ({'augmentation': 0}, 'augmentation: 0 there, 1 here'),
}


@pytest.mark.parametrize('case', OTHER_DATA)
def test_a_run_does_not_resume_with_other_data(uninterrupted, tmp_path, case):
  changes, message = OTHER_DATA[case]
  shutil.copytree(uninterrupted[0], tmp_path / 'run')
  facts = json.loads((tmp_path / 'run' / 'data.json').read_text(encoding='utf-8'))
  (tmp_path / 'run' / 'data.json').write_text(
    json.dumps(facts | {name: v for name, v in changes.items() if name in facts}), encoding='utf-8'
  )
  with pytest.raises(UserError, match=re.escape(message)):
    train(
      changed(**{name: value for name, value in changes.items() if name not in facts}),
      tmp_path / 'run',
    )


def test_a_checkpoint_of_another_architecture_is_refused(uninterrupted, tmp_path):
  shutil.copytree(uninterrupted[0], tmp_path / 'run')
  config = json.loads((tmp_path / 'run' / 'config.json').read_text(encoding='utf-8'))
  config['model']['mlp'] = 64  # As if a user had edited the file.
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config), encoding='utf-8')
  with pytest.raises(
    UserError, match=r'holds another architecture: .*\[2, 128\] there, float32\[2, 64\] here'
  ):
    train(changed(model__mlp=64), tmp_path / 'run')


@pytest.fixture
def photos(tmp_path):
  """Write two classes of 40 small photographs each, and return the folder.

  One file of the training split and one of the test split are truncated.
  """
  rng = np.random.default_rng(0)
  for i in range(80):
    path = (
      tmp_path
      / 'photos'
      / ('train' if i < 64 else 'test')
      / ('cats' if i % 2 else 'dogs')
      / f'{i:02}.jpg'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    data = simplejpeg.encode_jpeg(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    path.write_bytes(data[:-200] if i in (5, 70) else data)
  return tmp_path / 'photos'


def test_an_unreadable_image_is_an_error_that_names_it(photos, tmp_path):
  config = changed(data__train=f'folder:{photos}', steps=4, optim__warmup='0')
  with pytest.raises(UserError, match=r'05.jpg'):
    train(config, tmp_path / 'run')


def test_unreadable_images_are_skipped_by_config_counted_and_named(photos, tmp_path, capsys):
  config = changed(
    data__train=f'folder:{photos}',
    data__bad_images='skip',
    steps=8,
    optim__warmup='0',
    save_every='3',
  )
  result = train(config, tmp_path / 'run')
  assert (result['test_examples'], result['test_skipped']) == (15, 1)
  records = read_metrics(tmp_path / 'run')
  assert sum(record['skipped'] for record in records if 'loss' in record) == 2  # Two epochs of 64.
  assert [record['unreadable'] for record in records if 'unreadable' in record] == [[2], [2]]
  assert re.search(r'step \d .*example 2: .*cats/05.jpg: .*remature end', capsys.readouterr().err)


def test_more_unreadable_images_than_the_budget_end_the_run(photos, tmp_path):
  for i in (7, 9):
    (photos / 'train' / 'cats' / f'{i:02}.jpg').write_bytes(b'<html>not found</html>')
  config = changed(
    data__train=f'folder:{photos}',
    data__bad_images='skip',
    data__max_bad_fraction=0.03,
    steps=4,
    optim__warmup='0',
  )
  with pytest.raises(
    UserError,
    match=r'3 images .*step [34].*config.data.max_bad_fraction allows 2.*jpg',
  ):
    train(config, tmp_path / 'run')


def saved_states(workdir):
  """Return {step: {name of an array: its bytes}} of all checkpoints, read by Orbax alone.

  Raises AssertionError if a number is not finite.
  """
  found, checkpointer = {}, ocp.PyTreeCheckpointer()
  for path in sorted((workdir / 'checkpoints').iterdir(), key=lambda path: int(path.name)):
    tree = checkpointer.metadata(path / 'state').item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    state = checkpointer.restore(path / 'state', restore_args=as_numpy)
    arrays = {
      jax.tree_util.keystr(keys): np.asarray(leaf)
      for keys, leaf in jax.tree.leaves_with_path(state)
    }
    assert len(arrays) > 40 and all(np.isfinite(array).all() for array in arrays.values()), path
    found[int(path.name)] = {
      name: array.tobytes() for name, array in arrays.items() if name != "['step']"
    }
  return found


def test_a_diverging_run_ends_and_saves_only_finite_states(tmp_path, capsys):
  """The first update is 1e30 times the gradient, so that real overflows occur."""
  config = changed(
    optim__name='sgd',
    optim__lr=1e30,
    optim__warmup='0',
    optim__grad_clip_norm=0.0,
    optim__max_bad_steps=3,
  )
  with pytest.raises(DivergedError, match='steps 2 to 4 .*config.optim.max_bad_steps=3') as error:
    train(config, tmp_path)
  assert error.value.exit_code == 78
  saved = saved_states(tmp_path)
  assert list(saved) == [1, 2, 3, 4]
  assert saved[1] == saved[2] == saved[3] == saved[4]
  # A second start continues with the next batches.
  with pytest.raises(DivergedError, match='steps 5 to 7'):
    train(config, tmp_path)
  assert list(saved_states(tmp_path)) == list(range(1, 8))
  assert 'step 3 changes nothing' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['R1.1x1', 'EfficientNet-0.25x0.2'])
def test_a_convolutional_network_trains_resumes_and_is_loaded(tmp_path, variant):
  fields = {'stem_width': 32} if variant.startswith('R') else {'dropout': 0.1, 'drop_path': 0.1}
  config = changed(
    model=ModelConfig(variant=variant, **fields),
    data__randaug_ops=2,
    data__randaug_magnitude=5.0,
    steps=3,
  )
  result = train(config, tmp_path / 'full')
  assert result['test_examples'] == 500
  shutil.copytree(tmp_path / 'full', tmp_path / 'parts', ignore=shutil.ignore_patterns('3'))
  train(config, tmp_path / 'parts')
  assert bits(tmp_path / 'parts') == bits(tmp_path / 'full')
  loaded = vit_jax.load(str(tmp_path / 'full'))
  assert loaded.config.variant == variant
  assert loaded.logits(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 10)
