"""ViT on ImageNet with sharpness-aware minimization (arXiv 2106.01548, 2203.08065).

    python run_pretrain.py --config=configs/sam.py:B/16
    python run_pretrain.py --config=configs/sam.py:B/32,gsam

Argument: MODEL[,RULE] with RULE sam (the default), gsam or adamw, which is the baseline without
either. No augmentation but the inception crop and the flip: the rule takes its place. Adam with a
learning rate of 3e-3 that falls linearly to a hundredth, batch 4096, 300 epochs, and the sigmoid
loss, as in big_vision's proj/gsam. GSAM's weight decay, radius and alpha are those of its paper's
Table 4 for S/32, S/16, B/32 and B/16; another model has those of B/32. No source here has a radius
of SAM for these models; it is 0.6 too, constant.
Cost: twice that of the plain step. B/16 takes 300 epochs of ImageNet at 35 GFLOPs for a forward
pass of one image, 81 exaFLOPs. Not run here.
Expected top-1 with AdamW, SAM and GSAM: S/32 68.4, 70.5 and 73.8 %; S/16 74.4, 78.1 and 79.5 %;
B/32 71.4, 73.6 and 76.8 %; B/16 74.6, 79.9 and 81.0 % (GSAM's Table 1). `vit-jax tables sam` has
more.
"""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean

RULES = ('sam', 'gsam', 'adamw')
# MODEL: (the radius at the last learning rate, alpha). The paper has 0 for S; here 0 would mean a
# constant radius.
GSAM = {'S/32': (1e-6, 0.4), 'S/16': (1e-6, 1.0), 'B/32': (0.1, 0.6), 'B/16': (0.2, 0.4)}


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
      weight_decay=0.3,
      weight_decay_mask='.*/kernel',
      grad_clip_norm=1.0,
      **sharpness_settings(model, rule),
    ),
    epochs=300.0,
    loss='sigmoid',
    eval_every='5000',
    save_every='5000',
  )


def sharpness_settings(model: str, rule: str) -> dict[str, float]:
  """Return the settings of `optim` by which the rules differ."""
  if rule == 'adamw':
    return {}
  if rule == 'sam':
    return {'sam_rho': 0.6}
  low, alpha = GSAM.get(model, GSAM['B/32'])
  return {'sam_rho': 0.6, 'sam_rho_min': low, 'gsam_alpha': alpha}
