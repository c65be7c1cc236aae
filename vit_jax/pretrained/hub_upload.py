"""Upload a folder with a model to the Hugging Face hub, through the library `huggingface_hub`."""

from pathlib import Path

from vit_jax.errors import UserError, one_line
from vit_jax.pretrained.hub import hub_endpoint, is_unreachable, parse_hub_name

# Files that an earlier upload may have written. Others in a repository are not replaced.
PUSHED_FILES = {
  'README.md', 'config.json', 'model.json', 'model.npz', 'model.safetensors',
  'preprocessor_config.json',
}  # fmt: skip
_REPOSITORY_FILES = {'.gitattributes'}  # The hub makes it.
DEFAULT_REVISION = 'main'


def parse_push_name(name: str) -> str:
  """Return ORG/NAME. Raises UserError for another form, or one that the hub does not accept."""
  from huggingface_hub.errors import HFValidationError
  from huggingface_hub.utils import validate_repo_id

  try:
    validate_repo_id(name)
    if '/' in name and parse_hub_name(f'hf:{name}') == (name, None):
      return name
  except (HFValidationError, UserError):
    pass
  raise UserError(
    f'{name!r} is not a name on the hub: expected ORG/NAME, such as '
    f'my-user/flowers, of letters, digits and single - _ . between them'
  )


def upload_folder(
  folder: Path, name: str, *, private: bool, revision: str = '', message: str
) -> str:
  """Upload the files of a folder as one commit, and return the URL of the repository.

  The repository, and the branch `revision`, are created if they do not exist. Files of an earlier
  upload in another format are deleted.

  Raises UserError, before anything is uploaded, if there is no token or if the repository has other
  files; and if the hub refuses or cannot be reached.
  """
  from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

  hub = hub_endpoint() or 'https://huggingface.co'
  if not get_token():
    raise UserError(
      f'pushing needs a token with write access: create one at {hub}/settings/tokens, then log in '
      'with `hf auth login` or set HF_TOKEN'
    )
  api, revision = HfApi(endpoint=hub_endpoint()), revision or DEFAULT_REVISION
  try:
    present = _list_files(api, name, revision)
    if others := sorted(present - PUSHED_FILES - _REPOSITORY_FILES):
      raise UserError(
        f'{hub}/{name} has other files, such as {others[0]}: choose another name or --revision'
      )
    api.create_repo(name, private=private or None, exist_ok=True)
    if revision != DEFAULT_REVISION:
      api.create_branch(name, branch=revision, exist_ok=True)
    files = {path.name: path for path in sorted(folder.iterdir())}
    old = sorted(present & PUSHED_FILES - files.keys())
    api.create_commit(
      name,
      [
        *(CommitOperationAdd(file, path) for file, path in files.items()),
        *map(CommitOperationDelete, old),
      ],
      commit_message=message,
      revision=revision,
    )
  except UserError:
    raise
  except Exception as error:
    raise _explain(name, hub, error) from None
  return f'{hub}/{name}' + (f'/tree/{revision}' if revision != DEFAULT_REVISION else '')


def _list_files(api, name: str, revision: str) -> set[str]:
  """Return the files of a branch, or of the main branch if the branch is new; none without both."""
  from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

  for each in dict.fromkeys((revision, DEFAULT_REVISION)):
    try:
      info = api.model_info(name, revision=each, timeout=30)
      return {sibling.rfilename for sibling in info.siblings or ()}
    except RepositoryNotFoundError:
      break
    except RevisionNotFoundError:
      continue
  return set()


def _explain(name: str, hub: str, error: Exception) -> UserError:
  """Return the one-line error with what to do."""
  from huggingface_hub.errors import HfHubHTTPError

  if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
    # The upload of one of the files failed.
    error = error.__cause__
  status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
  if status == 401:
    return UserError(
      f'{hub} does not accept the token: log in again with `hf auth login`, or correct HF_TOKEN'
    )
  if status == 403:
    organization = name.partition('/')[0]
    return UserError(
      f'the token may not write to {name}: create one with write access at {hub}/settings/tokens, '
      f'and check that you are a member of {organization}'
    )
  if is_unreachable(error):
    return UserError(
      f'{hub} cannot be reached ({one_line(error)}): connect to the network and run the same '
      'command again'
    )
  return UserError(f'{hub} answered {one_line(error)}')
