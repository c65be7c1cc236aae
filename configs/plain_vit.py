"""ViT-S/16 on ImageNet: "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580).

    python run_pretrain.py --config=configs/plain_vit.py:S/16
    python run_pretrain.py --config=configs/plain_vit.py:S/16,300,linear_head

Argument: MODEL[,EPOCHS[,CHANGE]]. EPOCHS is 90, 150 or 300, by default 90. CHANGE is a row of the
paper's table of ablations: linear_head, batch_4096, learned_positions, class_token,
no_augmentation, original, or original_augmented.
Adam with a learning rate of 1e-3, batch 1024, cosine decay after 10,000 steps, RandAugment(2, 10)
and mixup 0.2; the mean of the patches, fixed positions, and an MLP as the head.
Cost: 90 epochs took the authors 6.5 hours on a TPU v3-8; 3.2 exaFLOPs. Not run here.
Expected top-1 after 90, 150 and 300 epochs: 76.5, 78.5 and 80.0 %. `vit-jax tables plain_vit` has
those of each change.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.settings.fields import with_settings

EPOCHS = ('90', '150', '300')
NO_AUGMENTATION = {
  'data.randaug_ops': 0, 'data.randaug_magnitude': 0.0, 'data.randaug_variant': 'intended',
  'mixup': 0.0,
}  # fmt: skip
# The paper does not list what `original` is beyond its text; these are the settings that its other
# rows change one by one: class token, learned positions, batch 4096, no augmentation.
ORIGINAL = {
  'model.pool': 'token', 'model.position': 'learned', 'data.batch': 4096,
}  # fmt: skip
CHANGES: dict[str, dict[str, object]] = {
  '': {},
  'linear_head': {'model.hidden_head': False},
  'batch_4096': {'data.batch': 4096},
  'learned_positions': {'model.position': 'learned'},
  'class_token': {'model.pool': 'token'},
  'no_augmentation': NO_AUGMENTATION,
  'original': ORIGINAL | NO_AUGMENTATION,
  'original_augmented': ORIGINAL,
}


def get_config(argument: str = 'S/16') -> Config:
  """Return the config for 'MODEL[,EPOCHS[,CHANGE]]'. Raises UserError for another argument."""
  model, epochs, change, *more = [*argument.split(','), '', '']
  epochs = epochs or EPOCHS[0]
  if epochs not in EPOCHS or change not in CHANGES or any(more):
    near = did_you_mean(change, CHANGES) if change not in CHANGES else ''
    raise UserError(
      f'--config=plain_vit:{argument}: expected MODEL[,EPOCHS[,CHANGE]] with {", ".join(EPOCHS)} '
      f'epochs.{near}'
    )
  return with_settings(baseline(model, float(epochs)), CHANGES[change])


def baseline(model: str, epochs: float) -> Config:
  """Return the config without changes."""
  return Config(
    data=DataConfig(
      train='tfds:imagenet2012',
      split='train[:99%]',
      eval_split='validation',
      batch=1024,
      size=(224, 224),
      randaug_ops=2,
      randaug_magnitude=10.0,
      randaug_variant='big_vision',
      eval_crop='center',
      workers=16,
    ),
    model=ModelConfig(
      variant=model, pool='gap', position='sincos2d', hidden_head=True, dtype='bfloat16', unroll=0
    ),
    optim=OptimConfig(
      name='adamw',
      lr=1e-3,
      schedule='cosine',
      warmup='10000',
      weight_decay=0.1,  # 1e-4 without the learning rate, as big_vision states it.
      weight_decay_mask='.*/kernel',
      grad_clip_norm=1.0,
      momentum_dtype='bfloat16',
    ),
    epochs=epochs,
    mixup=0.2,
    eval_every='5000',
    save_every='5000',
  )
