"""Set-up of all tests: eight simulated devices, a compilation cache, and shared fixtures."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

# Before jax is imported anywhere.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'

import jax
import pytest

from tests.torchvision_operators import tolerant

FULL_TESTS = Path(__file__).with_name('full_tests.txt')
CACHE = Path(__file__).parents[1] / '.cache' / 'compiled'
# Real photographs and weights, if they exist.
SHARED = Path(__file__).parents[2] / 'shared' / 'data'


def pytest_configure():
  jax.config.update('jax_compilation_cache_dir', str(CACHE))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Mark the tests of full_tests.txt as `full`.

  A line names one case of a test function, or the function with all its cases.
  """
  full = set(FULL_TESTS.read_text(encoding='utf-8').splitlines())
  for item in items:
    if full & {item.nodeid, item.nodeid.partition('[')[0]}:
      item.add_marker(pytest.mark.full)


@pytest.fixture
def shared() -> Path:
  """Return the directory of real photographs and weights, or skip the test if it is absent."""
  if not SHARED.is_dir():
    pytest.skip(f'no {SHARED}')
  return SHARED


@pytest.fixture(scope='session')
def timm():
  """Return the module timm, or skip the test if it is not installed."""
  torch = pytest.importorskip('torch')
  real = torch.library.register_fake
  torch.library.register_fake = tolerant(real)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      return pytest.importorskip('timm')
  finally:
    torch.library.register_fake = real


@pytest.fixture
def typed(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
  """Return a function that runs `python -m vit_jax …`.

  It returns (exit code, standard output, standard error).
  """
  from vit_jax.__main__ import main

  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(CACHE))

  def run(*args: str):
    monkeypatch.setattr('sys.argv', ['vit-jax', *args])
    try:
      main()
      code = 0
    except SystemExit as end:
      code = end.code
    return code, *capsys.readouterr()

  return run


@pytest.fixture
def png() -> Callable:
  """Return a function that encodes an image as PNG."""
  import cv2

  return lambda image: cv2.imencode('.png', image)[1].tobytes()


@pytest.fixture
def write_tfds() -> Callable:
  """Return a function that writes a TFDS data set as ArrayRecord, in order.

  Its arguments are (name, dir, features, {split: examples}).
  """
  import tensorflow_datasets as tfds

  def write(name: str, dir: Path, features: dict, splits: dict[str, list[dict]]):
    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):
      VERSION = tfds.core.Version('1.2.3')

      def _info(self):
        features_dict = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features_dict, disable_shuffling=True)

      def _split_generators(self, dl_manager):
        return {split: enumerate(examples) for split, examples in splits.items()}

      def _generate_examples(self):
        raise NotImplementedError

    Written.name = name
    Written(data_dir=dir, file_format='array_record').download_and_prepare()

  return write
