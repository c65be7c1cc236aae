"""The settings of a run: their types, defaults and units.

Nothing here touches a device or reads data. `config_checks.validate` checks them.
"""

import dataclasses
from dataclasses import dataclass, field

from vit_jax.config.optim import OptimConfig

__all__ = [
  'UNLABELLED_DEFAULTS', 'Config', 'DataConfig', 'DistillConfig', 'LoraConfig', 'MaskConfig',
  'MeshConfig', 'ModelConfig', 'OptimConfig',
]  # fmt: skip

# A comment describes the setting below it.
# A duration is a string: '500' means steps, '2ep' epochs, '10%' a part of the run.


@dataclass(slots=True, kw_only=True)
class DataConfig:
  """The examples, and how an image becomes an array.

  Batch `k` is a pure function of this config, the seed and `k`.
  """

  # A source: builtin:NAME, folder:PATH, csv:PATH, idx:PATH, tfds:NAME, vtab:TASK, records:PATH,
  # tar:PATH or parquet:PATH.
  train: str = 'builtin:fashion_mnist'
  # The split in TFDS's syntax, for every kind of source: 'train[:98%]', 'train+validation'. Any
  # split has the parts 'train/held_out:10%', with examples of every class, and 'train/rest:10%'.
  split: str = 'train'
  # The source to evaluate on. '' means the training source.
  eval: str = ''
  # '' means the held-out split of the source: the first that exists of test, validation and val.
  eval_split: str = ''
  # The directory of TFDS data sets. '' means $TFDS_DATA_DIR, or TFDS's own default.
  dir: str = ''
  # The source of the images that a teacher labels, such as images:PATH. Labels that the source has
  # are ignored. '' means none.
  unlabelled: str = ''
  unlabelled_split: str = 'train'
  # The number of unlabelled images in a batch for each labelled image.
  unlabelled_ratio: int = 1
  # The directory of the teacher's predictions, written by `python -m vit_jax selftrain`.
  pseudo_labels: str = ''
  # The lowest probability of the teacher's best class at which an image is used.
  confidence_threshold: float = 0.3
  # The number of images of each predicted class: the most confident ones. If a class has fewer, its
  # images repeat.
  unlabelled_per_class: int = 130_000
  # The number of images in a step, over all hosts, labelled and unlabelled.
  batch: int = 256
  # The number of images in an evaluation step, over all hosts. 0 means `batch`.
  eval_batch: int = 0
  # Height and width in pixels. One number means a square.
  size: tuple[int, int] = (224, 224)
  # inception: resize a random box, drawn as by TensorFlow. random_resized: drawn as by torchvision.
  # resize: resize the image without a crop.
  # random: resize to a square of side `resize_before_crop`, then crop at random.
  # simple: cover `size`, pad 4 pixels by reflection, crop at random (DeiT III).
  crop: str = 'inception'
  # The smallest and largest area of the random box, as fractions of the image's area.
  crop_area: tuple[float, float] = (0.05, 1.0)
  # The smallest and largest ratio of width to height of the random box.
  crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
  # The side in pixels of the square that the image is resized to before the random crop.
  resize_before_crop: int = 0
  # The number of RandAugment operations for each training image.
  randaug_ops: int = 0
  # The magnitude of these operations. Noisy Student uses 27 for its largest model. 0 also changes
  # the image. timm's magnitudes end at 10.
  randaug_magnitude: float = 0.0
  # noisystudent: as the published code of Noisy Student computes them, overflows included.
  # intended: without these overflows (data/randaugment.py). big_vision: its randaug(n, m).
  # timm: its rand-m9-mstd0.5-inc1 with this magnitude, as in DeiT.
  randaug_variant: str = 'intended'
  # One of grayscale, solarize and Gaussian blur for each training image (3-Augment of DeiT III).
  three_augment: bool = False
  # Brightness, contrast and saturation change by random factors of 1 - x to 1 + x.
  color_jitter: float = 0.0
  # The probability that a random box of a training image becomes noise (timm's mode pixel).
  random_erasing: float = 0.0
  # The number of copies of an example in a batch, each with its own augmentation.
  repeats: int = 1
  # Flip half of the training images from left to right.
  flip: bool = True
  # resize: resize the image to `size`. center: resize the short side, then crop the center.
  # squash: resize to a square, then crop the center. border: fit into a square, then pad.
  # none: crop the center without resizing. See data/preprocessing.py.
  eval_crop: str = 'resize'
  # HEIGHT,WIDTH of evaluation images, or one number. 0 means `size`. Position embeddings are
  # resampled as `init_positions` says.
  eval_size: tuple[int, int] = (0, 0)
  # The side in pixels to which `center`, `squash` and `border` resize.
  eval_short_side: int = 256
  # tf_bilinear (TensorFlow's, without antialiasing), tf_area (big_vision's for evaluation; training
  # then uses tf_bilinear), or an antialiased filter of Pillow, such as pil_bicubic.
  interpolation: str = 'tf_bilinear'
  # The interpolation of training images. '' means `interpolation`. pil_random: pil_bilinear or
  # pil_bicubic, at random (timm's).
  train_interpolation: str = ''
  # EXIF orientation: exif (turn photos upright), ignore, auto (exif for files, ignore for TFDS).
  orient: str = 'auto'
  # The inverse DCT of JPEGs. fast: TensorFlow's default. accurate: Pillow's and PyTorch's.
  # auto: accurate for files (folder:, csv:, images:, tar:, parquet:), fast for TFDS. Records are
  # decoded as the source that they were packed from.
  jpeg_dct: str = 'auto'
  # error: end the run. skip: leave an unreadable image out of loss and accuracy, and count it.
  bad_images: str = 'error'
  # The fraction of examples that may be skipped, rounded up. A larger number ends the run.
  max_bad_fraction: float = 0.001
  # An image with more pixels counts as unreadable. This guards against decompression bombs.
  max_pixels: int = 100_000_000
  # The number of processes that load batches. 0 means threads of the main process.
  workers: int = 0
  # Decoding threads in each process. 0 means one more than the process's part of the cores.
  threads: int = 0
  # The number of batches that are copied to the device ahead of their step.
  prefetch: int = 2

  @property
  def eval_image_size(self) -> tuple[int, int]:
    """Height and width in pixels of evaluation images."""
    height, width = self.eval_size if any(self.eval_size) else self.size
    return height, width


@dataclass(slots=True, kw_only=True)
class ModelConfig:
  """The Vision Transformer.

  `variant` gives the shape. `width`, `depth`, `mlp` and `heads` replace its numbers if not 0.
  """

  # A name in models/variants.py, and for Transformers the side of a patch in pixels.
  variant: str = 'B/16'
  width: int = 0
  depth: int = 0
  mlp: int = 0
  heads: int = 0
  # The output channels of the first convolution of a ResNet or of a hybrid such as R50+B/16.
  stem_width: int = 64
  # The head's input: token (a class token), gap (mean of the patches), map (attention pooling).
  pool: str = 'token'
  # Adds a tanh layer of the model's width before the head: the paper's pre-training head.
  hidden_head: bool = False
  # The initial bias of a new head: -10 for the sigmoid loss with many classes.
  head_bias: float = 0.0
  # Adds a class token to a model with pool=gap, whose head does not read it.
  class_token: bool = False
  # Adds a second token to a model with pool=token. The head reads both side by side (DeiT).
  distillation_token: bool = False
  # Position embeddings: learned, learned2d (one for columns, one for rows), relative (added to the
  # attention scores), relative2d (a bias of the scores for each head and each offset in rows and
  # columns, as in BEiT), sincos2d, none, rope (rotates queries and keys by the column and row of
  # their patch, as in DINOv3), learned+rope (both, as in EVA-02).
  position: str = 'learned'
  # Where learned positions are added: stem (to the patches), every (before each block, each with
  # its own parameters), shared (before each block, all with the same parameters).
  position_at: str = 'stem'
  # The base of the rotation periods of the position rope.
  rope_theta: float = 100.0
  # The number that rope counts along each side of an image, whatever its size: patches of the
  # original size (EVA-02). 0 means coordinates from -1 to 1 (DINOv3).
  rope_grid: int = 0
  # Rotates registers as if they were a square of patches, with this base. 0 means no rotation.
  rope_register_theta: float = 0.0
  # The number of learned tokens that take part in attention and are dropped after the last block.
  registers: int = 0
  # Adds a LayerNorm before and after the patch projection ("dual patch norm").
  patch_norm: bool = False
  # Adds a LayerNorm before the first block, as in CLIP.
  pre_norm: bool = False
  # Applies the last LayerNorm to the mean of the patches, after pooling, instead of to each token.
  fc_norm: bool = False
  # Adds a LayerNorm for the queries and one for the keys, over the channels of a head.
  qk_norm: bool = False
  # The projections that have a bias: qkv (queries, keys and values), qv (not the keys), none.
  qkv_bias: str = 'qkv'
  # The projection of the patches has a bias.
  patch_bias: bool = True
  # The initial value of LayerScale, trained factors of a branch's channels. 0 means no LayerScale.
  layer_scale: float = 0.0
  # The MLP computes silu(gate) * hidden instead of GELU(hidden). The gate is a third linear layer.
  swiglu: bool = False
  # Adds a norm of the hidden layer of the MLP, as in EVA-02.
  mlp_norm: bool = False
  # The norms of the model: layernorm, rmsnorm (neither subtracts the mean nor adds a bias).
  norm: str = 'layernorm'
  # auto (the kernel for the device), xla, pallas (our TPU kernel), cudnn (NVIDIA's).
  attention: str = 'auto'
  dropout: float = 0.0
  # Stochastic depth: the probability that the last block is left out for an image.
  drop_path: float = 0.0
  # That of earlier blocks: linear (it grows from 0 in the first block), uniform (it is the same).
  drop_path_schedule: str = 'linear'
  # tanh (the approximation that the original code uses), erf (exact),
  # quick (x * sigmoid(1.702 x), CLIP's).
  gelu: str = 'tanh'
  norm_eps: float = 1e-6
  # 3 (RGB) or 1 (grey). Color images become grey as in Pillow's mode L (ITU-R 601).
  channels: int = 3
  # The model computes (image - mean) / scale, for each channel of a uint8 image.
  mean: tuple[float, ...] = (127.5, 127.5, 127.5)
  scale: tuple[float, ...] = (127.5, 127.5, 127.5)
  # The type of the computation: float32, bfloat16. Parameters are float32.
  dtype: str = 'float32'
  # Activations that the backward pass recomputes: none, vit (norms, GELU, softmax), dots (all but
  # matrix products), full (all).
  remat: str = 'none'
  # The number of blocks in an iteration of the loop over depth. 0 means all. The layout of the
  # parameters does not depend on it.
  unroll: int = 1

  @property
  def has_class_token(self) -> bool:
    """True if a class token precedes the patches."""
    return self.pool == 'token' or self.class_token

  @property
  def prefix_tokens(self) -> int:
    """Number of tokens before the patches."""
    return self.has_class_token + self.distillation_token

  @property
  def has_rope(self) -> bool:
    """True if queries and keys are rotated."""
    return self.position.endswith('rope')


@dataclass(slots=True, kw_only=True)
class MaskConfig:
  """Masked patch prediction: learning without labels (arXiv 2010.11929, App. B.1.2)."""

  # What to predict: colour (mean of a patch, 3 bits a channel), grid (4x4 such colours), pixels.
  # '' means that the run learns from labels.
  target: str = ''
  # The fraction of the patches of an image that are corrupted and predicted.
  rate: float = 0.5


@dataclass(slots=True, kw_only=True)
class LoraConfig:
  """Low-rank adapters (LoRA, arXiv 2106.09685) of the model of `init`.

  An adapted kernel is W + alpha / rank · A B. A and B are trained, and W is not.
  """

  # The number of columns of A and of rows of B. 0 means no adapters: all parameters are trained.
  rank: int = 0
  # The factor of the products A B is alpha / rank.
  alpha: float = 16.0
  # The kernels with adapters: a regular expression that matches the full path.
  targets: str = 'Transformer/encoderblock/.*(query|value)/kernel'
  # The parameters that are trained themselves, and have no adapters: a regular expression that
  # matches the full path. '' means none.
  train: str = '(head|pre_logits)/.*'


@dataclass(slots=True, kw_only=True)
class DistillConfig:
  """Knowledge distillation (arXiv 2106.05237): the targets are the predictions of a teacher.

  The teacher is frozen. It sees the very images of the student, mixed ones included.
  """

  # Any argument of `vit_jax.load` with the classes of the data. '' means no teacher.
  teacher: str = ''
  # The variant of the teacher. '' means that of its file. `train --dry_run` and `plan` do not read
  # the file if it is set.
  variant: str = ''
  # Divides the logits of teacher and student before the softmax. The divergence is multiplied by
  # its square.
  temperature: float = 1.0
  # The weight of the divergence from the teacher. The loss of the labels has the rest of 1.
  weight: float = 1.0


@dataclass(slots=True, kw_only=True)
class MeshConfig:
  """The mesh of devices. Its axis `data` has the number of devices divided by `fsdp`."""

  # The number of devices that share one copy of the parameters.
  fsdp: int = 1


@dataclass(slots=True, kw_only=True)
class Config:
  """All settings of a run."""

  data: DataConfig = field(default_factory=DataConfig)
  model: ModelConfig = field(default_factory=ModelConfig)
  optim: OptimConfig = field(default_factory=OptimConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  mask: MaskConfig = field(default_factory=MaskConfig)
  lora: LoraConfig = field(default_factory=LoraConfig)
  distill: DistillConfig = field(default_factory=DistillConfig)
  # The length of the run. Exactly one of steps and epochs is not 0.
  steps: int = 0
  epochs: float = 0.0
  seed: int = 0
  # softmax, sigmoid (independent classes).
  loss: str = 'softmax'
  # The sigmoid loss of an example. sum: over the classes. mean: over the classes, as in PyTorch and
  # DeiT III.
  sigmoid_reduction: str = 'sum'
  # Targets of the sigmoid loss above this number become 1, and all others 0. 0 means no threshold.
  target_threshold: float = 0.0
  label_smoothing: float = 0.0
  # The weight of an example in the loss. none: 1. balanced: the number of examples divided by
  # (number of classes x number of examples of its class).
  class_weights: str = 'none'
  # The parameter of mixup's Beta distribution. 0 means no mixup.
  mixup: float = 0.0
  # The parameter of CutMix's Beta distribution. 0 means no CutMix.
  cutmix: float = 0.0
  # The probability that a batch has CutMix instead of mixup, if both are on.
  cutmix_probability: float = 0.5
  # The initial parameters: any argument of `vit_jax.load`. '' means random.
  init: str = ''
  # How learned positions are resampled to another grid: corner (the paper), half_pixel, bicubic.
  init_positions: str = 'corner'
  # The head of a run that starts from `init`. new: zeros (the paper). keep: the head of `init`.
  # probe: a logistic regression on the features of the training images.
  init_head: str = 'new'
  # Writes the ids of each step's examples and its exact loss to ids.jsonl.
  log_ids: bool = False
  # Further places for the numbers of metrics.jsonl: wandb, mlflow (metrics/trackers.py).
  writers: tuple[str, ...] = ()
  # FIRST:END traces the steps FIRST to END - 1 for TensorBoard's profile plugin. '' means none.
  profile: str = ''
  # A duration, like the other `*_every` settings.
  log_every: str = '50'
  eval_every: str = '1ep'
  # Further evaluations, each PROTOCOL:SOURCE (evaluate/protocols.py): 'fewshot:builtin:digits'.
  probes: tuple[str, ...] = ()
  # A duration. 0 means only after the last step.
  probe_every: str = '0'
  # The L2 regularization of few-shot regression. The paper states none; big_vision uses 1024.
  fewshot_l2: float = 1024.0
  save_every: str = '1ep'
  # The number of newest checkpoints to keep.
  max_to_keep: int = 2
  # A duration. Checkpoints at its multiples are never deleted. 0 means none.
  keep_every: str = '0'
  # Seconds that the first step or a checkpoint may take. A run that exceeds them prints its stacks
  # and exits. 0 means no limit.
  first_step_timeout: float = 2400.0
  # The same limit for each later step.
  step_timeout: float = 600.0


# The settings of unlabelled images in a run without such images.
UNLABELLED_DEFAULTS = {
  f.name: f.default
  for f in dataclasses.fields(DataConfig)
  if f.name in ('pseudo_labels', 'confidence_threshold') or f.name.startswith('unlabelled')
}
