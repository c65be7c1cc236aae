"""`load` from every kind of source, with overrides and with errors."""

import http.server
import json
import re
import subprocess
import sys
import threading
import time

import flax.traverse_util
import jax
import numpy as np
import pytest

import vit_jax
from tests.pretrained.released_layout import draw, google_file
from vit_jax.config import ModelConfig
from vit_jax.data.imagenet import imagenet_class_names
from vit_jax.errors import UserError
from vit_jax.pretrained.catalogue import ReleasedCheckpoint
from vit_jax.pretrained.image_size import ASSUMED_SQUARE_NOTE
from vit_jax.pretrained.npz import to_google
from vit_jax.pretrained.resample import pi_resize, resample_grid

CONFIG = ModelConfig(variant='mu/8', depth=3, heads=4)
SIZE = (32, 32)
POSITION = 'Transformer/posembed_input/pos_embedding'
IMAGES = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)


@pytest.fixture
def file(tmp_path):
  google_file(tmp_path / 'model.npz', CONFIG, classes=5, size=SIZE)
  return tmp_path / 'model.npz'


SHAPES = [
  ({}, 5), ({'mlp': 100}, 5), ({'hidden_head': True}, 5), ({}, 0), ({'pool': 'gap'}, 5),
  ({'pool': 'map'}, 3),
  ({'variant': 'mu/8x4'}, 5), ({'variant': 'R+mu/16', 'stem_width': 64}, 5),
  ({'variant': 'R26+mu/32', 'stem_width': 32}, 5),
  ({'variant': 'R1.2+mu/16', 'stem_width': 32}, 5),
  ({'variant': 'Ti/16', 'depth': 12, 'heads': 3}, 5),
]  # fmt: skip


@pytest.mark.parametrize(('fields', 'classes'), SHAPES, ids=str)
def test_the_architecture_is_inferred_from_the_arrays(tmp_path, fields, classes):
  config = ModelConfig(**{'variant': 'mu/8', 'depth': 3, 'heads': 4} | fields)
  size = (64, 64) if '+' in config.variant or config.variant == 'Ti/16' else SIZE
  google_file(tmp_path / 'model.npz', config, classes=classes, size=size)
  found = vit_jax.load(
    str(tmp_path / 'model.npz'), size=size if config.variant == 'mu/8x4' else None
  )
  from vit_jax.models.vit import build_vit

  assert found.model.shape == build_vit(config, classes).shape
  assert (found.classes, found.size) == (classes, size)
  assert (found.config.pool, found.config.hidden_head) == (config.pool, config.hidden_head)
  if '+' not in config.variant and 'mlp' not in fields and config.depth != 3:
    assert found.config.variant == 'Ti/16'  # A published shape gets its name.


def test_overrides_replace_assumed_values(file):
  plain = vit_jax.load(str(file))
  assert (plain.config.gelu, plain.config.norm_eps) == ('tanh', 1e-6)
  assert plain.config.mean == plain.config.scale == (127.5, 127.5, 127.5)
  overridden = vit_jax.load(
    str(file), gelu='erf', norm_eps=1e-5, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    crop='center', short_side=40,
    labels=tuple('abcde'),
  )  # fmt: skip
  assert (overridden.config.gelu, overridden.config.norm_eps, overridden.config.mean) == (
    'erf',
    1e-5,
    (123.675, 116.28, 103.53),
  )
  assert overridden.config.scale == (58.395, 57.12, 57.375)
  steps = overridden.preprocessing
  assert (steps.size, steps.crop, steps.resize_size) == (SIZE, 'center', (40, 40))
  assert (steps.mean, steps.scale) == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
  assert overridden.labels == tuple('abcde')
  assert (
    np.abs(np.asarray(plain.logits(IMAGES)) - np.asarray(overridden.logits(IMAGES))).max() > 1e-3
  )


def test_another_size_resamples_the_positions_with_a_note(file):
  plain, larger = (
    vit_jax.load(str(file)),
    vit_jax.load(str(file), size=(48, 40), positions='bicubic'),
  )
  assert (larger.size, larger.grid) == ((48, 40), (6, 5))
  table = flax.traverse_util.flatten_dict(plain.params, sep='/')[POSITION]
  expected = resample_grid(table[0, 1:].reshape(4, 4, -1), (6, 5), 'bicubic').reshape(30, -1)
  np.testing.assert_array_equal(
    flax.traverse_util.flatten_dict(larger.params, sep='/')[POSITION][0, 1:], expected
  )
  assert larger.notes == ('position embeddings resampled from 4x4 to 6x5',)
  assert plain.notes == (ASSUMED_SQUARE_NOTE.format(4, 4),)


def test_an_overridden_short_side_is_exact_and_a_stored_one_scales_with_the_size(file):
  file.with_suffix('.json').write_text(
    json.dumps({'crop': 'center', 'short_side': 40}), encoding='utf-8'
  )
  assert vit_jax.load(str(file), size=48, short_side=50).preprocessing.resize_size == (50, 50)
  assert vit_jax.load(str(file), size=48).preprocessing.resize_size == (60, 60)


def test_another_patch_size_resizes_the_kernel_with_a_note(file):
  plain, finer = vit_jax.load(str(file)), vit_jax.load(str(file), patch=12)
  np.testing.assert_array_equal(
    finer.params['embedding']['kernel'], pi_resize(plain.params['embedding']['kernel'], (12, 12))
  )
  assert (finer.size, finer.grid) == ((48, 48), (4, 4))
  assumed = ASSUMED_SQUARE_NOTE.format(4, 4)
  assert finer.notes == ('patch kernels resized from 8x8 to 12x12', assumed)


@pytest.mark.parametrize(('classes', 'which'), [(1000, 'imagenet1k'), (21843, 'imagenet21k')])
def test_the_class_counts_of_imagenet_imply_its_labels_with_a_note(tmp_path, classes, which):
  google_file(tmp_path / 'model.npz', CONFIG, classes=classes, size=SIZE)
  found = vit_jax.load(str(tmp_path / 'model.npz'))
  assert found.labels == imagenet_class_names(which)
  labels = f'{classes:,} classes: assuming the labels of {which}'
  assert found.notes == (ASSUMED_SQUARE_NOTE.format(4, 4), labels)


def test_a_sidecar_adds_facts(file):
  file.with_suffix('.json').write_text(
    json.dumps({'gelu': 'erf', 'labels': list('abcde'), 'mean': [1, 2, 3]}), encoding='utf-8'
  )
  found = vit_jax.load(str(file))
  assert (found.config.gelu, found.labels, found.config.mean) == ('erf', tuple('abcde'), (1, 2, 3))


def test_a_json_file_with_other_fields_is_ignored(file):
  file.with_suffix('.json').write_text(
    json.dumps({'gelu': 'erf', 'author': 'me'}), encoding='utf-8'
  )
  assert vit_jax.load(str(file)).config.gelu == 'tanh'
  file.with_suffix('.json').write_text('[1, 2]', encoding='utf-8')
  with pytest.raises(UserError, match='model.json'):
    vit_jax.load(str(file))


def test_differences_from_the_catalogue_are_noted(tmp_path, monkeypatch):
  google_file(tmp_path / 'model.npz', CONFIG, classes=5, size=SIZE)
  from vit_jax.pretrained import loading

  row = ReleasedCheckpoint(
    name='sam/x', url='https://host/x.npz', pixels=224, classes=7, note='for fine-tuning'
  )
  monkeypatch.setattr(loading, 'find_checkpoint_of_file', lambda path: row)
  assert vit_jax.load(str(tmp_path / 'model.npz')).notes == (
    'for fine-tuning',
    'the catalogue lists 7 classes, the file has 5',
    'the catalogue lists 224 pixels, the file has position embeddings for 32x32',
  )


def test_a_pattern_means_its_newest_match(tmp_path):
  for i, classes in enumerate((3, 4)):
    google_file(tmp_path / f'model{i}.npz', CONFIG, classes=classes, size=SIZE)
    time.sleep(0.02)
  assert vit_jax.load(str(tmp_path / 'model*.npz')).classes == 4
  odd = tmp_path / '[a]*'
  odd.mkdir()
  (tmp_path / 'model0.npz').rename(odd / 'model0.npz')
  assert vit_jax.load(str(odd / 'model*.npz')).classes == 3


def test_a_url_is_downloaded_once(tmp_path, monkeypatch, file):
  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.server.requests += 1
      self.send_response(200)
      self.send_header('Content-Length', str(file.stat().st_size))
      self.end_headers()
      self.wfile.write(file.read_bytes())

    def log_message(self, *args):
      pass

  monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
    server.requests = 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/vit/model.npz'
    one, two = vit_jax.load(url), vit_jax.load(url)
    server.shutdown()
  assert server.requests == 1
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_a_catalogue_name_is_downloaded_and_has_its_accuracy(tmp_path, monkeypatch):
  google_file(tmp_path / 'model.npz', CONFIG, classes=1000, size=SIZE)
  from vit_jax.pretrained import loading

  row = ReleasedCheckpoint(
    name='sam/x',
    url='https://host/x.npz',
    pixels=32,
    classes=1000,
    labels='imagenet1k',
    accuracy=81.2,
    accuracy_from='paper',
  )
  monkeypatch.setattr(loading, 'find_checkpoint', {'sam/x': row}.get)
  monkeypatch.setattr(loading, 'fetch', lambda url, *, size: tmp_path / 'model.npz')
  found = vit_jax.load('sam/x')
  assert (found.source, found.accuracy, found.accuracy_from) == ('sam/x', 81.2, 'paper')
  assert found.labels == imagenet_class_names('imagenet1k')
  assert found.notes == ()  # Neither the labels nor the size were assumed.


WRONG = {
  # (source, overrides), part of the message.
  'nothing there': (
    lambda path: ('nowhere/model.npz', {}),
    'nowhere/model.npz',
  ),
  'a near name': (
    lambda path: ('ViT-B16-224', {}),
    "Did you mean 'imagenet21k.imagenet2012/ViT-B_16-224'",
  ),
  'no run yet': (lambda path: ('runs/none-*', {}), 'run_pretrain.py'),
  'an unknown setting': (
    lambda path: (path, {'gelus': 'erf'}),
    "'gelus'. Did you mean 'gelu'",
  ),
  'an unknown GELU': (lambda path: (path, {'gelu': 'relu'}), "config.model.gelu='relu'"),
  'statistics of 255': (lambda path: (path, {'mean': 127.5}), 'mean=127.5'),
  'two statistics': (lambda path: (path, {'std': (0.5, 0.5)}), 'std='),
  'too few labels': (lambda path: (path, {'labels': ('a', 'b')}), '2 labels for 5 classes'),
  'a size that does not divide': (
    lambda path: (path, {'size': 36}),
    '36x36 .* 8x8',
  ),
  'a size of three': (lambda path: (path, {'size': (8, 8, 3)}), 'expected pixels'),
  'heads that are not its': (
    lambda path: (path, {'heads': 2}),
    '4 heads.* heads=2',
  ),
  'an unknown method': (lambda path: (path, {'positions': 'nearest'}), "positions='nearest'"),
}


@pytest.mark.parametrize('case', WRONG)
def test_an_invalid_source_or_override_raises_one_line(file, case):
  make, message = WRONG[case]
  source, overrides = make(str(file))
  with pytest.raises(UserError, match=message) as error:
    vit_jax.load(source, **overrides)
  assert '\n' not in str(error.value)


BROKEN = {
  # Change of the arrays of a valid file: part of the message.
  'missing': (
    lambda a: a.pop('Transformer/encoder_norm/scale'),
    'encoder_norm/scale .* is missing',
  ),
  'no attention': (
    lambda a: [a.pop(name) for name in list(a) if '/query/kernel' in name],
    'query/kernel',
  ),
  'extra': (lambda a: a.update({'surprise': np.zeros(3)}), r'surprise \[3\]'),
  'wrong shape': (
    lambda a: a.update({'cls': np.zeros((1, 1, 7))}),
    r'cls .*\[1, 1, 7\].*\[1, 1, 32\]',
  ),
  'wrong rank': (
    lambda a: a.update({'embedding/kernel': np.zeros((8, 8))}),
    'embedding/kernel .*4 axes',
  ),
  'NaN': (lambda a: a.update({'head/bias': np.full(5, np.nan)}), 'head/bias contains NaN'),
  'integers': (lambda a: a.update({'head/bias': np.zeros(5, int)}), 'head/bias .*int64'),
  'positions that are no square': (
    lambda a: a.update({POSITION: np.zeros((1, 12, 32))}),
    '11 position embeddings',
  ),
  'heads of two kinds': (
    lambda a: a.update(
      {
        'Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel': np.zeros(
          (32, 2, 16)
        )
      }
    ),
    'key/kernel .* in block 1',
  ),
  'far too many blocks': (
    lambda a: a.update({'Transformer/encoderblock_99999999999/LayerNorm_0/scale': np.zeros(32)}),
    'block 99999999999',
  ),
  'another model': (
    lambda a: (a.clear(), a.update({'conv1/kernel': np.zeros(3)})),
    'conv1/kernel',
  ),
  'nothing': (lambda a: a.clear(), 'none'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_an_incomplete_model_raises_one_line_within_a_second(tmp_path, case):
  change, message = BROKEN[case]
  arrays = to_google(draw(CONFIG, 5, SIZE))
  change(arrays)
  np.savez(tmp_path / 'model.npz', **arrays)
  vit_jax.load  # noqa: B018 -- import it before the clock starts.
  began = time.process_time()
  with pytest.raises(UserError, match=message) as error:
    vit_jax.load(str(tmp_path / 'model.npz'))
  assert time.process_time() - began < 1
  assert '\n' not in str(error.value)
  assert 'model.npz' in str(error.value)


def test_big_endian_and_fortran_order_give_the_same_model(tmp_path, file):
  arrays = to_google(draw(CONFIG, 5, SIZE))
  np.savez(
    tmp_path / 'odd.npz',
    **{name: np.asfortranarray(array.astype('>f4')) for name, array in arrays.items()},
  )
  odd, plain = vit_jax.load(str(tmp_path / 'odd.npz')), vit_jax.load(str(file))
  jax.tree.map(np.testing.assert_array_equal, odd.params, plain.params)


def test_import_and_version_do_not_import_jax():
  code = 'import sys, vit_jax; print(vit_jax.__version__); assert "jax" not in sys.modules'
  command = [sys.executable, '-c', code]
  version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  assert re.match(r'\d+\.\d+', version)
