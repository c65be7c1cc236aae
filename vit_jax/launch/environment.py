"""The environment of the launched command. Its values may be secret, such as tokens and keys."""

import base64
import os
import re
import secrets

from vit_jax.errors import UserError
from vit_jax.launch.shell import quote_word

_NAME = re.compile(r'[A-Za-z_][A-Za-z0-9_]*')
# Variables that bash computes or protects: another value would not reach the command.
_BASH_NAMES = re.compile(
  r'_|BASH\w*|DIRSTACK|EPOCH(REALTIME|SECONDS)|E?UID|FUNCNAME|GROUPS|HISTCMD|LINENO|OPTIND|PPID'
  r'|S?RANDOM|SECONDS|SHELLOPTS|SHLVL'
)
PUBLIC_NAMES = ('LIBTPU_INIT_ARGS',)  # Set by `launch`, and shown. All other values are secret.
RUN_TOKEN = 'VIT_JAX_RUN_TOKEN'  # Shared by the hosts of a run when they meet (rendezvous.py).
# Variable of a container that holds the secret values in base64: xpk puts values between quotes
# into YAML, where Kubernetes also expands $(NAME).
PACKED_NAME = 'VIT_JAX_ENVIRONMENT'
_MAX_PACKED_BYTES = 100_000  # Linux limits a variable to 128 KiB.


def parse_env(text: str) -> tuple[str, str]:
  """Parse 'NAME=VALUE'.

  'NAME' alone takes the value from this environment, so that no secret is on a command line. The
  value is in no error message.
  """
  name, equals, value = text.partition('=')
  shown = f'--env={name}=…' if equals else f'--env={name}'
  if not _NAME.fullmatch(name):
    raise UserError(
      f'{shown}: expected NAME=VALUE, or the NAME of a variable that is set here; a name has '
      'letters, digits and underscores'
    )
  if _BASH_NAMES.fullmatch(name):
    raise UserError(f'{shown}: the start script cannot set {name}, which belongs to bash')
  if not equals and name not in os.environ:
    raise UserError(f'{shown}: {name} is not set here; `export {name}` first, or give {name}=VALUE')
  return name, value if equals else os.environ[name]


def new_run_token() -> dict[str, str]:
  """Return the variable with a new random token."""
  return {RUN_TOKEN: secrets.token_hex(16)}


def secret_part(env: dict[str, str]) -> dict[str, str]:
  """Return the variables whose values are shown nowhere: all but PUBLIC_NAMES."""
  return {name: value for name, value in env.items() if name not in PUBLIC_NAMES}


def public_part(env: dict[str, str]) -> dict[str, str]:
  """Return the variables whose values may be shown."""
  return {name: value for name, value in env.items() if name in PUBLIC_NAMES}


def export_lines(env: dict[str, str], *, masked: bool = False) -> str:
  """Return the lines of a script that set variables.

  A masked value is taken from the shell's variable of that name, which is an error if it is unset.
  """
  shown = {name: masked_value(name) if masked else quote_word(env[name]) for name in env}
  return ''.join(f'export {name}={value}\n' for name, value in shown.items())


def masked_value(name: str) -> str:
  """Return the text that stands for a secret value in what is printed."""
  return f'"${{{name}?}}"'


def pack_environment(env: dict[str, str]) -> str:
  """Return the line of xpk's --env-file that holds the secret values."""
  packed = base64.b64encode(export_lines(secret_part(env)).encode()).decode()
  if len(packed) > _MAX_PACKED_BYTES:
    raise UserError(
      f'the values of --env are {len(packed)} bytes in base64, more than the {_MAX_PACKED_BYTES} '
      'that a container takes; put them into a file in --data or --workdir'
    )
  return f'{PACKED_NAME}={packed}\n'


def format_packing(env: dict[str, str], path: str) -> str:
  """Return the shell command that writes the file of `pack_environment` from set variables."""
  names = secret_part(env)
  checked = f': {" ".join(map(masked_value, names))}'
  declared = f'declare -p {" ".join(names)} | base64 --wrap=0'
  return f'(umask 077; {checked}; echo "{PACKED_NAME}=$({declared})" > {path})'
