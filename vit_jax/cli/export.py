"""Command `export`: write a model in another format."""

from pathlib import Path

from vit_jax.cli.arguments import add_model_flags, load_model, model_overrides
from vit_jax.errors import UserError

FORMATS = ('npz', 'timm', 'huggingface', 'onnx', 'stablehlo')
ONNX_OPTIONS = ('opset', 'float16')  # Arguments of `export_model`.
OPSETS = (17, 20)  # As in pretrained/onnx_graph.py.
SUFFIXES = {'.npz': 'npz', '.onnx': 'onnx', '.stablehlo': 'stablehlo'}


def export(args):
  """Write a model in another format, read it back, and compare its outputs."""
  if args.adapters:
    export_adapters(args)
    return
  export_format = resolve_format(Path(args.to), args.format)
  options = {name: value for name in ONNX_OPTIONS if (value := getattr(args, name))}
  if options and export_format != 'onnx':
    raise UserError(f'--{min(options)} is only for --format onnx, and this is {export_format}')
  model = load_model(args)
  from vit_jax.pretrained.export import export_model

  for line in export_model(model, Path(args.to), export_format, **options):
    print(line)


def export_adapters(args):
  """Write the adapters of a run alone.

  Raises UserError for a flag that has no effect on them.
  """
  overrides = model_overrides(args)
  others = [name for name in ('format', *ONNX_OPTIONS, *overrides) if getattr(args, name)]
  if others:
    raise UserError(f'--{others[0]} has no effect on --adapters')
  if Path(args.to).suffix != '.safetensors':
    raise UserError(f'--to {args.to}: adapters are a file whose name ends in .safetensors')
  from vit_jax.pretrained.adapters import write_adapters
  from vit_jax.pretrained.loading import resolve_source

  print(write_adapters(resolve_source(args.init)[0], Path(args.to)))


def resolve_format(path: Path, flag: str | None) -> str:
  """Return the format of --format, or the one that the suffix of the path implies.

  Raises UserError if there is neither, or if they contradict each other.
  """
  implied = SUFFIXES.get(path.suffix.lower())
  if flag is None and implied is None:
    choices = ' or '.join(f'--format {name}' for name in FORMATS)
    raise UserError(f'--to {path}: the suffix does not determine the format; add {choices}')
  if flag and implied and flag != implied:
    raise UserError(f'--format {flag} contradicts --to {path}: {path.suffix} means {implied}')
  return flag or implied


def add(commands):
  """Add the command and its arguments to the parser."""
  command = commands.add_parser('export', help=export.__doc__, description=export.__doc__)
  command.set_defaults(function=export)
  command.add_argument(
    '--to',
    required=True,
    metavar='PATH',
    help='file or directory to write; the suffixes .npz, .onnx and .stablehlo determine the format',
  )
  command.add_argument(
    '--format', choices=FORMATS, help='required for timm and huggingface, which are directories'
  )
  command.add_argument(
    '--opset',
    type=int,
    choices=OPSETS,
    help='version of the ONNX operators: 17 (default) runs in more programs (onnxruntime 1.12, '
    'TensorRT 8.6); 20 has GELU as one operator and needs onnxruntime 1.17',
  )
  command.add_argument(
    '--float16',
    action='store_true',
    help='write an ONNX file of half the size: weights and products in float16, norms and softmax '
    'in float32; the types of input and output do not change',
  )
  command.add_argument(
    '--adapters',
    action='store_true',
    help='write only the adapters and the head of a run with config.lora.rank: a small '
    '.safetensors file, which --init takes where the model that the run started from exists',
  )
  add_model_flags(command)
