"""Pre-training of ResNets with SGD: "Big Transfer" (arXiv 1912.11370).

    python run_pretrain.py --config=configs/bit_pretrain.py:R50x1,jft,7 \\
      --config.data.train=folder:/data/jft

Argument: a ResNet, a data set (imagenet, imagenet21k, jft), and optionally the number of epochs.
R50x1, R152x2, … are ResNets of version 1; BiT-R50x1, … are of version 2, as BiT's own. BiT has 90
epochs, and 40 on JFT. The learning rate falls at the same parts of a run of any length.
Table 7 of arXiv 2010.11929 compares R50x1 and R152x2, in 7 epochs of JFT, with Adam, which is
configs/pretrain.py:R50x1,jft.
Cost: in 7 epochs of JFT R50x1 takes 50 exaFLOPs, R152x2 563 (Table 6). Not run here.
Expected, fine-tuned on ImageNet: R50x1 78.24 % (Adam 77.54), R152x2 84.37 % (Adam 84.97) (Table 7);
BiT-S R152x4 81.30 %, BiT-M R152x4 85.39 % (arXiv 1912.11370).

JFT-300M is not public, and TFDS does not have ImageNet-21k. Set --config.data.train to your own
copy or to a substitute.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.recipes import check_data_set

# arXiv 1912.11370, section 3.2: batch 4,096, a warm-up of 5,000 steps, a factor of 10 at each
# boundary, and a learning rate of 0.03 for each 256 images.
# data: ((source, training split, evaluation split), epochs, epochs after which the rate falls)
RECIPES = {
  'imagenet':    (('tfds:imagenet2012', 'train', 'validation'),             90, (30, 60, 80)),
  'imagenet21k': (('folder:imagenet21k', 'train[51200:]', 'train[:25600]'), 90, (30, 60, 80)),
  'jft':         (('folder:jft', 'train[50000:]', 'train[:50000]'),         40, (10, 23, 30, 37)),
}  # fmt: skip


def get_config(argument: str = 'R50x1,jft,7') -> Config:
  """Return the config for 'VARIANT,DATA' or 'VARIANT,DATA,EPOCHS'.

  Raises UserError for an unknown data set.
  """
  variant, _, rest = argument.partition(',')
  data, _, epochs = rest.partition(',')
  check_data_set(data, RECIPES, recipe='bit_pretrain', argument=argument)
  (source, split, eval_split), published, boundaries = RECIPES[data]
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
      lr_boundaries=','.join(f'{100 * epoch / published:.4g}%' for epoch in boundaries),
      warmup='5000',
      weight_decay=1e-4,
      coupled_weight_decay=True,
    ),
    epochs=float(epochs or published),
    loss='sigmoid' if multi_label else 'softmax',
    eval_every='5000',
    save_every='5000',
  )
