"""The command `push`: upload the model of a run to the Hugging Face hub."""

import tempfile
from pathlib import Path

from vit_jax.cli.results import format_table, report_elapsed_time
from vit_jax.errors import UserError, mask_credentials
from vit_jax.runtime.screen import print_stderr


def push(args):
  """Show what an upload of a run to the Hugging Face hub would contain; with --yes, upload it."""
  from vit_jax.cli.arguments import print_notes
  from vit_jax.cli.jobs import hide_library_messages
  from vit_jax.evaluate.predict import check_trained_head
  from vit_jax.pretrained.hub_upload import parse_push_name, upload_folder
  from vit_jax.pretrained.loading import load
  from vit_jax.pretrained.model_card import read_run_facts
  from vit_jax.pretrained.push import write_repository

  name = parse_push_name(args.name)
  workdir = find_run(args.run)
  facts = read_run_facts(workdir)
  hide_library_messages()
  model = load(str(workdir))
  if model.classes:
    check_trained_head(model)
  print_notes(model)
  with tempfile.TemporaryDirectory(prefix='vit-jax-push-') as temporary:
    folder = Path(temporary)
    with report_elapsed_time(f'exporting {workdir}'):
      command = mask_credentials(training_command(facts.config))
      options = {'command': command, 'license': args.license}
      for note in write_repository(model, facts, folder, name, **options):
        print_stderr(note)
    if not args.yes:
      print(describe_upload(folder, name, private=args.private, revision=args.revision), end='')
      return
    with report_elapsed_time(f'uploading to {name}'):
      url = upload_folder(
        folder,
        name,
        private=args.private,
        revision=args.revision,
        message='Upload with vit-jax',
      )
  print(
    f'{url}\n\nvit-jax predict --init hf:{name}{"@" * bool(args.revision)}{args.revision} IMAGE …'
  )


def find_run(source: str) -> Path:
  """Return the run directory, the newest if several match. Raises UserError if there is none."""
  from vit_jax.pretrained.loading import newest_match

  path = newest_match(source)
  if not path or not (path / 'config.json').is_file() or not (path / 'metrics.jsonl').is_file():
    raise UserError(
      f'{source} is not a run directory: expected one that train, finetune or sweep wrote'
    )
  return path


def training_command(config) -> str:
  """Return a `vit-jax train` command that has all settings of a run."""
  from vit_jax.cli.finetune import format_train_command

  recipe = 'quickstart'
  if config.init and '/' in config.model.variant:
    recipe = f'finetune:{config.model.variant},folder'
  return format_train_command(config, recipe, Path('runs/again'))


def describe_upload(folder: Path, name: str, *, private: bool, revision: str) -> str:
  """Return what would be uploaded: the files with their sizes, and the card."""
  kind = 'private' if private else 'public'
  branch = f', branch {revision}' if revision else ''
  rows = [(path.name, f'{path.stat().st_size:,} bytes') for path in sorted(folder.iterdir())]
  card = (folder / 'README.md').read_text(encoding='utf-8')
  return (
    f'would upload to {name} ({kind} if it is new{branch}):\n{format_table(rows)}\n'
    f'README.md:\n\n{card}\nnothing was uploaded: add --yes\n'
  )


def add(commands):
  """Add the command and its arguments."""
  command = commands.add_parser('push', help=push.__doc__, description=push.__doc__)
  command.set_defaults(function=push)
  command.add_argument('run', metavar='RUN', help='run directory; a pattern selects the newest')
  command.add_argument('name', metavar='ORG/NAME', help='repository, which is created if it is new')
  command.add_argument('--yes', action='store_true', help='upload; without it nothing is sent')
  command.add_argument('--private', action='store_true', help='make a new repository private')
  command.add_argument(
    '--revision', default='', metavar='BRANCH', help='branch, which is created if it is new'
  )
  command.add_argument(
    '--license', default='', metavar='ID', help="licence of the model, such as 'apache-2.0'"
  )
