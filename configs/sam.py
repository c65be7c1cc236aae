"""ViT on ImageNet with sharpness-aware minimization (arXiv 2106.01548, 2203.08065).

    python run_pretrain.py --config=configs/sam.py:B/16
    python run_pretrain.py --config=configs/sam.py:B/32,gsam

Argument: MODEL[,RULE] with RULE sam (the default) or gsam. No augmentation but the inception crop
and the flip: the rule takes its place. big_vision's open config (proj/gsam): Adam with a learning
rate of 3e-3 that falls linearly to a hundredth, batch 4096, 300 epochs, the sigmoid loss, and for
GSAM a radius from 0.6 to 0.1 that follows the learning rate, with alpha 0.6. It gives no radius for
SAM; here it is 0.6 too, constant.
Cost: twice that of the plain step. B/16 takes 300 epochs of ImageNet at 35 GFLOPs for a forward
pass of one image, 81 exaFLOPs. Not run here.
Expected top-1 (from memory, unverified): SAM S/16 78.1, B/32 73.6, B/16 79.9 %; GSAM S/32 73.8,
S/16 79.5, B/32 76.8, B/16 81.0 %.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean

RULES = {
  'sam': {'sam_rho': 0.6},
  'gsam': {'sam_rho': 0.6, 'sam_rho_min': 0.1, 'gsam_alpha': 0.6},
}


def get_config(argument: str = 'B/16') -> Config:
  """Return the config for 'MODEL[,RULE]'. Raises UserError for an unknown rule."""
  model, _, rule = argument.partition(',')
  rule = rule or 'sam'
  if rule not in RULES:
    raise UserError(f'--config=sam:{argument}: unknown rule {rule!r}.{did_you_mean(rule, RULES)}')
  return Config(
    data=DataConfig(
      train='tfds:imagenet2012',
      split='train[:99%]',
      eval_split='validation',
      batch=4096,
      size=(224, 224),
      eval_crop='center',
      workers=16,
    ),
    model=ModelConfig(
      variant=model, pool='gap', head_bias=-10.0, dtype='bfloat16', unroll=1, remat='vit'
    ),
    optim=OptimConfig(
      name='adamw',
      lr=3e-3,
      lr_end=3e-5,
      schedule='linear',
      warmup='10000',
      weight_decay=1 / 3,  # 1e-3 without the learning rate, as big_vision states it.
      weight_decay_mask='.*/kernel',
      grad_clip_norm=1.0,
      **RULES[rule],
    ),
    epochs=300.0,
    loss='sigmoid',
    eval_every='5000',
    save_every='5000',
  )
