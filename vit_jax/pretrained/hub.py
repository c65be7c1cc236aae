"""Download a model of the Hugging Face hub by its name, `hf:ORG/NAME` or `hf:ORG/NAME@REVISION`.

The library `huggingface_hub` does the work: its cache, which other libraries share, resuming, the
token of `hf auth login`, and the variables HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Only
the files that `load` reads are downloaded. Of the weights, safetensors come first.
"""

import os
import re
from pathlib import Path

from vit_jax.errors import UserError, one_line
from vit_jax.pretrained.weight_files import SAFETENSORS_FILES, TORCH_FILE, choose_weights

HUB_PREFIX = 'hf:'
# Read from the repository where it has them, beside the NAME.json of a NAME.npz.
SETTINGS_FILES = ('config.json', 'preprocessor_config.json')
WEIGHT_SUFFIXES = ('.safetensors', '.npz', '.bin')
_NAME_PATTERN = re.compile(r'[\w.-]+/[\w.-]+', re.ASCII)


def is_hub_name(source: str) -> bool:
  """Return whether a source is the name of a model on the Hugging Face hub."""
  return source.startswith(HUB_PREFIX)


def parse_hub_name(source: str) -> tuple[str, str | None]:
  """Return (ORG/NAME, revision or None) of 'hf:ORG/NAME@REVISION'.

  Raises UserError for another form.
  """
  name, at, revision = source.removeprefix(HUB_PREFIX).partition('@')
  if not _NAME_PATTERN.fullmatch(name) or (at and not revision):
    raise UserError(
      f'{source}: expected {HUB_PREFIX}ORG/NAME or {HUB_PREFIX}ORG/NAME@REVISION, '
      'such as hf:facebook/dinov2-small'
    )
  return name, revision or None


def fetch_from_hub(source: str) -> Path:
  """Return the local path of a model of the hub: a weights file, or a folder of its shards.

  The settings files are beside the weights. Files in the cache are not downloaded again; without a
  network the cache is used alone.

  Raises UserError if the model does not exist, is not accessible, or has no weights that `load`
  reads. Raises it too if the hub cannot be reached and the cache lacks a file.
  """
  from huggingface_hub import hf_hub_download  # Slow to import.

  name, revision = parse_hub_name(source)
  files = _list_files(source, name, revision)
  weights = choose_weights(files, source)
  paths = []
  sidecars = [f'{file[:-4]}.json' for file in weights if file.endswith('.npz')]
  for file in [*weights, *(file for file in (*SETTINGS_FILES, *sidecars) if file in files)]:
    try:
      # By revision, not by commit, so that the cache knows the commit when there is no network.
      path = hf_hub_download(name, file, revision=revision, endpoint=hub_endpoint())
    except Exception as error:
      raise _explain(source, name, error) from None
    paths.append(Path(path))
  if len({path.parent for path in paths}) > 1:  # The cache has a folder for each commit.
    raise UserError(f'{source} changed during the download; load it again')
  return paths[0] if len(weights) == 1 else paths[0].parent


def _list_files(source: str, name: str, revision: str | None) -> list[str]:
  """Return the files of a repository, from the hub or else from the cache."""
  from huggingface_hub import HfApi

  try:
    info = HfApi(endpoint=hub_endpoint()).model_info(name, revision=revision, timeout=30)
  except Exception as error:
    files = _list_cached_files(name, revision) if is_unreachable(error) else []
    if not any(file.endswith(WEIGHT_SUFFIXES) for file in files):
      raise _explain(source, name, error) from None
    return files
  return [sibling.rfilename for sibling in info.siblings or ()]


def _list_cached_files(name: str, revision: str | None) -> list[str]:
  """Return the files of a repository that are in the cache."""
  from huggingface_hub import try_to_load_from_cache

  for file in (*SETTINGS_FILES, *SAFETENSORS_FILES, TORCH_FILE):
    path = try_to_load_from_cache(name, file, revision=revision)
    if isinstance(path, str):
      return [path.name for path in Path(path).parent.iterdir()]
  return []


def hub_endpoint() -> str | None:
  """Return the URL of another hub, read now and not when the library was imported."""
  return os.environ.get('HF_ENDPOINT') or None


def is_unreachable(error: Exception) -> bool:
  """Return whether an error means that the hub did not answer, or must not be asked."""
  from huggingface_hub.errors import HfHubHTTPError, HTTPError

  if isinstance(error, HfHubHTTPError):
    return error.response.status_code >= 500
  return isinstance(error, (OSError, HTTPError))  # HTTPError includes failed connections.


def _explain(source: str, name: str, error: Exception) -> UserError:
  """Return the one-line error with what to do."""
  from huggingface_hub import errors

  hub = hub_endpoint() or 'https://huggingface.co'
  if isinstance(error, errors.GatedRepoError):
    remedy = f'accept its conditions at {hub}/{name}, then log in with `hf auth login`'
    return UserError(f'{source} is only for users who accepted its conditions; {remedy}')
  if isinstance(error, errors.RevisionNotFoundError):
    return UserError(f'{source}: {name} has no such revision; see {hub}/{name}/commits/main')
  if isinstance(error, errors.RepositoryNotFoundError):
    return UserError(
      f'{source}: the hub has no model {name}, or it is private. Check the name at {hub}, or log '
      'in with `hf auth login`'
    )
  if isinstance(error, errors.HfHubHTTPError):
    return UserError(f'{source}: {hub} answered {one_line(error)}')
  return UserError(
    f'{source}: {hub} cannot be reached and the cache has no complete copy ({one_line(error)}). '
    'Connect to the network, or copy the files here and load their folder'
  )
