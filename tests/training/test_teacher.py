"""The teacher of distillation: what it has to fit, and what a run with one writes and refuses."""

import functools
import json
from pathlib import Path
from unittest import mock

import flax.traverse_util
import jax
import numpy as np
import pytest

from vit_jax.checkpoint.manager import load_newest_params
from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.config_checks import validate
from vit_jax.data.imagenet import imagenet_class_names, imagenet_synsets
from vit_jax.data.preprocessing import Preprocessing
from vit_jax.errors import UserError
from vit_jax.pretrained.loading import load
from vit_jax.pretrained.model import PretrainedModel
from vit_jax.report.run_facts import read_run
from vit_jax.report.summary import describe_run
from vit_jax.settings.fields import with_settings
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import batch_sharding, make_mesh
from vit_jax.step import predict_sharded_logits
from vit_jax.train import train
from vit_jax.training.teacher import check_teacher, describe_teacher, load_teacher

LABELS = tuple('0123456789')
CONFIG = Config(
  data=DataConfig(
    train='builtin:digits', split='train[:64]', eval_split='test[:32]', batch=16, size=(8, 8)
  ),
  model=ModelConfig(variant='mu/4', depth=1, width=16, heads=2, mlp=16),
  optim=OptimConfig(name='sgd', lr=0.1),
  steps=2,
  eval_every='0',
  save_every='1',
)


def make_pretrained(*, labels=LABELS, classes=10, channels=3, head=1.0) -> PretrainedModel:
  config = ModelConfig(
    variant='mu/4', depth=1, width=16, heads=2, mlp=16, channels=channels,
    mean=(127.5,) * channels, scale=(127.5,) * channels,
  )  # fmt: skip
  return PretrainedModel(
    source='teacher',
    params={'head': {'kernel': np.full((16, classes), head), 'bias': np.zeros(classes)}},
    config=config,
    classes=classes,
    preprocessing=Preprocessing(size=(8, 8), channels=channels),
    labels=labels,
  )


def distilled(**settings) -> Config:
  return with_settings(CONFIG, {'distill.teacher': 'teacher'} | settings)


def test_a_teacher_with_the_classes_and_images_of_the_run_is_accepted():
  check_teacher(distilled(), make_pretrained(), LABELS)
  check_teacher(distilled(**{'distill.variant': 'mu/4'}), make_pretrained(), LABELS)
  check_teacher(distilled(), make_pretrained(labels=()), LABELS)


def test_synsets_of_imagenet_are_the_classes_of_its_names():
  names, synsets = imagenet_class_names('imagenet1k'), imagenet_synsets('imagenet1k')
  teacher = make_pretrained(labels=names, classes=1000)
  check_teacher(distilled(), teacher, synsets)
  with pytest.raises(UserError, match="'tench' and 'n01443537'"):
    check_teacher(distilled(), teacher, (synsets[1], synsets[0], *synsets[2:]))


@pytest.mark.parametrize(
  ('teacher', 'settings', 'words'),
  [
    ({'labels': (*'012345678', 'nine')}, {}, "distill.teacher='teacher'.*'nine' and '9'"),
    ({'labels': (), 'classes': 11}, {}, 'distill.teacher.*11 and 10 classes'),
    ({'labels': (), 'classes': 0}, {}, 'no head'),
    ({'head': 0.0}, {}, 'distill.teacher.*its head is zeros'),
    ({'channels': 1}, {}, 'distill.teacher.*1 channel.*model.channels=3'),
    ({}, {'distill.variant': 'B/16'}, "distill.variant='B/16'.*'mu/4'"),
  ],
)
def test_another_teacher_is_refused_with_the_setting_and_the_difference(teacher, settings, words):
  with pytest.raises(UserError, match=words):
    check_teacher(distilled(**settings), make_pretrained(**teacher), LABELS)


def test_a_teacher_is_described_by_its_variant_without_its_file():
  config = distilled(**{'distill.variant': 'BiT-R50x1', 'model.dtype': 'bfloat16'})
  model = describe_teacher(config, 7)
  assert (model.classes, model.config.variant, model.config.dtype) == (7, 'BiT-R50x1', 'bfloat16')
  assert describe_teacher(CONFIG, 7) is None
  with pytest.raises(UserError, match=r"'teacher'.*config\.distill\.variant"):
    describe_teacher(distilled(), 7)


@pytest.mark.parametrize('parts', [1, 2])
def test_logits_of_split_parameters_are_those_of_the_model(parts):
  """On eight devices, two of which share a copy of the parameters."""
  model = describe_teacher(distilled(**{'distill.variant': 'mu/4'}), 10)
  images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
  params = model.init(jax.random.key(0), images)['params']
  draw = lambda x: np.random.default_rng(x.size).standard_normal(x.shape, np.float32)
  params = jax.tree.map(draw, params)
  mesh = make_mesh(2, batches={})
  with mock.patch('vit_jax.sharding.fsdp.MIN_SHARDED_SIZE', 256):
    shards = jax.device_put(params, state_shardings(params, mesh))
    assert any('fsdp' in leaf.sharding.spec for leaf in jax.tree.leaves(shards))
    predict = functools.partial(predict_sharded_logits, model=model, mesh=mesh, parts=parts)
    logits = jax.jit(predict)(shards, jax.device_put(images, batch_sharding(mesh)))
  expected = model.apply({'params': params}, images)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def teacher_run(tmp_path_factory) -> str:
  """Return the directory of a run."""
  path = tmp_path_factory.mktemp('teacher') / 'run'
  train(with_settings(CONFIG, {'steps': 1}), path)
  return str(path)


def test_a_teacher_is_resampled_to_the_images_of_the_run_and_says_so(teacher_run):
  config = validate(with_settings(CONFIG, {'distill.teacher': teacher_run, 'data.size': (16, 16)}))
  teacher = load_teacher(config, LABELS)
  text = '\n'.join(teacher.notes)
  assert f'learns from {teacher_run}' in text
  assert '16x16 pixels here, and had 8x8' in text
  assert 'position embeddings resampled from 2x2 to 4x4' in text
  # A class token and 4x4 patches.
  assert teacher.params['Transformer']['posembed_input']['pos_embedding'].shape == (1, 17, 16)
  own = load_teacher(with_settings(config, {'data.size': (8, 8)}), LABELS)
  assert own.notes == [f'learns from {load(teacher_run).source}']
  # Other versions of NumPy may round resampled positions in another way, so they do not count.
  assert own.facts == teacher.facts


def test_a_run_with_a_teacher_does_not_save_it_and_refuses_another(teacher_run, tmp_path):
  link, workdir = tmp_path / 'teacher', tmp_path / 'run'
  link.symlink_to(teacher_run)
  config = validate(with_settings(CONFIG, {'distill.teacher': str(link), 'optim.ema': 0.5}))
  train(config, workdir)
  ours, alone = (
    flax.traverse_util.flatten_dict(load_newest_params(path)[0], sep='/')
    for path in (workdir, Path(teacher_run))
  )
  assert ours.keys() == alone.keys()
  facts = json.loads((workdir / 'data.json').read_text(encoding='utf-8'))
  assert facts['teacher.variant'] == 'mu/4'
  # The teacher has the FLOPs of the student, whose step is three forward passes.
  run, model = read_run(workdir), load(str(workdir))
  total = 4 * model.model.shape.flops((8, 8)) * 16 * 2
  assert f'about {total:.2g} floating-point operations' in ' '.join(describe_run(run, model))
  link.unlink()
  link.symlink_to(workdir)  # Another model.
  with pytest.raises(UserError, match=r'teacher\.content'):
    train(config, workdir)
