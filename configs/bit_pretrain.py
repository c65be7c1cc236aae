"""Pre-training ResNets with SGD, as BiT did: "Big Transfer" (arXiv 1912.11370), and Table 7 of arXiv 2010.11929.

    python run_pretrain.py --config=configs/bit_pretrain.py:R50x1,jft,7 --config.data.train=folder:/data/jft

Argument: a ResNet (R50x1, R152x2, … are V1; BiT-R50x1, … V2, as BiT's own are), a data set (imagenet, imagenet21k, jft) and the
epochs, where they are not BiT's 90 or 40. Table 7 compares R50x1 and R152x2 on JFT in 7 epochs with Adam, which is
configs/pretrain.py:R50x1,jft. The staircase falls at the same shares of the run, whatever its length.
Cost: R50x1 on JFT in 7 epochs 50 exaFLOPs, R152x2 563 (Table 6). Not run here.
Expected: fine-tuned on ImageNet, R50x1 78.24 % (Adam 77.54), R152x2 84.37 % (Adam 84.97) (Table 7). BiT-S R152x4 81.30 %, BiT-M
R152x4 85.39 % (arXiv 1912.11370).

JFT-300M is not public, and ImageNet-21k is not in TFDS: point --config.data.train at your own copy or stand-in.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean

# Of arXiv 1912.11370, §3.2. Batch 4,096, a warm-up of 5,000 steps, a tenth at each fall; a rate of 0.03 for every 256 images.
# data:         source, training split, evaluation split                     epochs  epochs after which the rate falls
RECIPES = {
  'imagenet':    (('tfds:imagenet2012', 'train', 'validation'),                  90, (30, 60, 80)),
  'imagenet21k': (('folder:imagenet21k', 'train[51200:]', 'train[:25600]'),      90, (30, 60, 80)),
  'jft':         (('folder:jft', 'train[50000:]', 'train[:50000]'),              40, (10, 23, 30, 37)),
}  # fmt: skip


def get_config(argument: str = 'R50x1,jft,7') -> Config:
  """The recipe that 'VARIANT,DATA' or 'VARIANT,DATA,EPOCHS' names. UserError for a data set that BiT has not."""
  variant, _, rest = argument.partition(',')
  data, _, epochs = rest.partition(',')
  if data not in RECIPES:
    raise UserError(
      f'configs/bit_pretrain.py:{argument}: BiT has no data set {data!r}.{did_you_mean(data, RECIPES)}'
    )
  (source, split, eval_split), usual, falls = RECIPES[data]
  multi_label = data != 'imagenet'
  return Config(
    data=DataConfig(
      train=source,
      split=split,
      eval_split=eval_split,
      batch=4096,
      size=(224, 224),
      eval_crop='center',
      workers=16,
    ),
    model=ModelConfig(variant=variant, head_bias=-10.0 if multi_label else 0.0, dtype='bfloat16'),
    optim=OptimConfig(
      name='sgd',
      lr=0.03 * 4096 / 256,
      schedule='staircase',
      lr_boundaries=','.join(f'{100 * epoch / usual:.4g}%' for epoch in falls),
      warmup='5000',
      weight_decay=1e-4,
      coupled_weight_decay=True,
    ),
    epochs=float(epochs or usual),
    loss='sigmoid' if multi_label else 'softmax',
    eval_every='5000',
    save_every='5000',
  )
