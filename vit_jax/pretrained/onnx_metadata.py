"""The metadata of an ONNX file: what a program needs that has only the file.

Every value is text, and JSON where it is not a word or a sentence:

  class_names           names of the classes in the order of the logits, if they are known
  activation            softmax or sigmoid: what turns logits into probabilities
  input                 what the graph takes
  size                  [height, width] in pixels
  mean, std             of pixels in [0, 1], for each channel; the graph normalizes by itself
  preprocessing         all fields of `Preprocessing`
  preprocessing_steps   the same as sentences, in order
"""

import json

from vit_jax.data.preprocessing import Preprocessing
from vit_jax.pretrained.model import PretrainedModel

# The names of the 21,843 classes of ImageNet-21k have 0.6 MB.
MAX_CLASS_NAMES_BYTES = 2**20
# Interpolation -> its description.
_INTERPOLATIONS = {
  'tf_bilinear': 'bilinear with half-pixel centers and without antialiasing, as tf.image.resize',
  'tf_area': 'the mean over the area of an output pixel, as tf.image.resize',
}


def onnx_metadata(model: PretrainedModel) -> dict[str, str]:
  """Return the metadata of a model. Class names are left out if they have more than 1 MiB."""
  steps, channels = model.preprocessing, model.config.channels
  kind = 'grey' if channels == 1 else 'RGB'
  names = _to_json(list(model.labels))
  fits = len(names.encode()) <= MAX_CLASS_NAMES_BYTES
  return {
    **({'class_names': names} if model.labels and fits else {}),
    **({'activation': model.loss} if model.classes else {}),
    'input': f'uint8 {kind} [b, height, width, {channels}] from 0 to 255; the graph normalizes it',
    'size': _to_json(steps.size),
    'mean': _to_json([value / 255 for value in steps.mean]),
    'std': _to_json([value / 255 for value in steps.scale]),
    'preprocessing': _to_json(steps.to_dict()),
    'preprocessing_steps': _to_json(describe_steps(steps)),
  }


def describe_steps(steps: Preprocessing) -> list[str]:
  """Return a sentence for each step from an image file to the input of the graph."""
  decoding = steps.decoding(user_file=True)
  filter_name = _INTERPOLATIONS.get(
    steps.interpolation, f"Pillow's {steps.interpolation.removeprefix('pil_')}, antialiased"
  )
  size = '{}x{}'.format(*steps.size)
  resized = '{}x{}'.format(*steps.resize_size or steps.size)
  crops = {
    'resize': [f'Resize to {size} (height x width) without a crop: {filter_name}.'],
    'center': [f'Scale to cover {resized} (height x width): {filter_name}.'],
    'squash': [f'Resize to {resized} (height x width): {filter_name}.'],
    'border': [
      f'Scale to fit into {resized} (height x width): {filter_name}.',
      f'Center on {size} filled with the mean.',
    ],
    'none': [],
  }
  return [
    f'Decode to 8-bit RGB{", JPEGs with the fast inverse DCT" if decoding["fast_dct"] else ""}.',
    *(['Turn upright by the EXIF orientation.'] if decoding['orient'] else []),
    *(["Convert to grey as Pillow's mode L (ITU-R 601)."] if steps.channels == 1 else []),
    *crops[steps.crop],
    *([f'Crop {size} at the center.'] if steps.crop in ('center', 'squash', 'none') else []),
  ]


def _to_json(value) -> str:
  return json.dumps(value, ensure_ascii=False)
