"""Fixtures: transformers, which may not be installed, and a simulated Hugging Face hub."""

import http.server
import threading
import warnings

import pytest
from huggingface_hub import constants

from tests.pretrained.hub_server import Hub


@pytest.fixture(scope='session')
def transformers(timm):
  """Return the module transformers. Its import also imports torchvision."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip('transformers')


@pytest.fixture
def empty_hub(monkeypatch, tmp_path):
  """Return a simulated hub without repositories, and set up an empty cache and no token."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
  server.repos, server.branches, server.large, server.visibility = {}, {}, {}, {}
  server.requests, server.status = [], 0
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  monkeypatch.setenv('HF_ENDPOINT', f'http://localhost:{server.server_port}')
  monkeypatch.delenv('HF_TOKEN', raising=False)
  monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)  # Its protocol is not HTTP alone.
  yield server
  server.shutdown()
  server.server_close()
  thread.join()
