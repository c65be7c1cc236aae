"""Masked patch prediction: "An Image is Worth 16x16 Words" (arXiv 2010.11929), App. B.1.2.

    python run_pretrain.py --config=configs/self_supervised.py:B/16,imagenet \\
      --config.data.dir=/data/tfds
    python run_finetune.py --config=configs/finetune.py:B/16,imagenet \\
      --config.init=runs/self_supervised-B_16_imagenet-*

Argument: a variant (the paper's is B/16) and a data set (jft, imagenet21k, imagenet). JFT-300M is
not public. The paper saw similar gains from ImageNet, and little more after 100,000 steps
(--config.steps=100000).
Half of the patch embeddings are corrupted: 80 % of them become a learned mask, 10 % another patch's
embedding, and 10 % stay as they are. The model predicts the mean colour of each corrupted patch,
with 3 bits a channel, from its token. The paper also tried two other targets
(--config.mask.target=grid and pixels), and less corruption, which was slightly worse
(--config.mask.rate=0.15).
Cost: a million steps of 4,096 images; B/16 takes 432 exaFLOPs, about 200 TPUv3-core-days at 40 % of
the peak (an estimate). Only the miniature was run here: `python -m vit_jax tables selfsupervision
--scale=mini`, in results/README.md.
Expected: 79.9 % on ImageNet after fine-tuning, pre-trained on JFT-300M. From scratch the paper has
77.91 %.

The paper gives no weight decay and no dropout for this run, so there is none. Its augmentation was
a flip and an Inception crop (google-research/vision_transformer issue 103). Its code was never
released.
"""

from vit_jax.config import Config, DataConfig, MaskConfig, ModelConfig, OptimConfig
from vit_jax.recipes import check_data_set

# data: (source, training split, evaluation split), as in configs/pretrain.py.
DATA = {
  'jft': ('folder:jft', 'train[50000:]', 'train[:50000]'),
  'imagenet21k': ('folder:imagenet21k', 'train[51200:]', 'train[:25600]'),
  'imagenet': ('tfds:imagenet2012', 'train', 'validation'),
}


def get_config(argument: str = 'B/16,imagenet') -> Config:
  """Return the config for 'VARIANT,DATA'. Raises UserError for an unknown data set."""
  variant, _, data = argument.partition(',')
  check_data_set(data, DATA, recipe='self_supervised', argument=argument)
  source, split, eval_split = DATA[data]
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
    model=ModelConfig(variant=variant, dtype='bfloat16', unroll=0),
    optim=OptimConfig(
      name='adamw', lr=2e-4, schedule='cosine', warmup='10000', momentum_dtype='bfloat16'
    ),
    mask=MaskConfig(target='colour', rate=0.5),
    steps=1_000_000,
    eval_every='5000',
    save_every='5000',
  )
