"""export: a model in another format."""

from pathlib import Path

from vit_jax.cli.arguments import add_model, load_model
from vit_jax.errors import UserError

FORMATS = ('npz', 'timm', 'huggingface', 'onnx', 'stablehlo')
SUFFIXES = {'.npz': ('npz',), '.onnx': ('onnx',), '.stablehlo': ('stablehlo',)}


def export(args):
  """Writes a model in another format, reads it back and says how far its logits are from what they were."""
  format = format_of(Path(args.to), args.format)
  model = load_model(args)
  from vit_jax.pretrained.export import export_model as write_model

  for line in write_model(model, Path(args.to), format):
    print(line)


def format_of(path: Path, said: str | None) -> str:
  """What was said, or else what the suffix says. UserError where it says nothing, two things, or another."""
  fits = SUFFIXES.get(path.suffix.lower(), ())
  if said is None and len(fits) == 1:
    return fits[0]
  if said is None:
    choice = ' or '.join(f'--format {name}' for name in fits or FORMATS)
    raise UserError(f'--to {path}: its suffix does not tell the format; add {choice}')
  if fits and said not in fits:
    raise UserError(
      f'--format {said} and --to {path} do not go together: {path.suffix} is for {" or ".join(fits)}'
    )
  return said


def add(commands):
  """The arguments."""
  command = commands.add_parser('export', help=export.__doc__, description=export.__doc__)
  command.set_defaults(function=export)
  command.add_argument(
    '--to',
    required=True,
    metavar='FILE',
    help='its suffix says the format: .npz, .onnx, .stablehlo',
  )
  command.add_argument(
    '--format', choices=FORMATS, help='timm and huggingface, which are directories, must be said'
  )
  add_model(command)
