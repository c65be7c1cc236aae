"""Pre-training at scale: "Scaling Vision Transformers" (arXiv 2106.04560), and PaLI's ViT-e.

    python run_pretrain.py --config=configs/scaling.py:G/14 --config.data.train=folder:/data/jft3b
    python run_finetune.py --config=configs/scaling.py:G/14,finetune_imagenet --config.init=RUN

Argument: MODEL[,finetune_imagenet]. MODEL is a row of the paper's Table 2 (s/28, s/16, S/32, Ti/16,
B/32, S/16, B/28, B/16, L/16, g/14 with 1.0 billion parameters, G/14 with 1.8 billion), or e/14 with
3.9 billion (PaLI, arXiv 2209.06794).
Adafactor with a momentum in bfloat16, a weight decay of 0.03 and of 3 for the head, the sigmoid
loss, attention pooling, and a reciprocal square root schedule with a linear cool-down. g, G and e
take a million steps of 16,384 images, as in the authors' config for g. The paper's best G saw
5 million times 4,096 images, a quarter more. Smaller models take 4 million steps of 4,096, the
longest run of the paper's tables.
Cost: three forward passes for a step at 533 (g), 965 (G) and 1,980 (e) GFLOPs for an image; 26,200,
47,400 and 97,300 exaFLOPs. Not run here.
Expected after fine-tuning on ImageNet at 518 pixels: G 90.45 %, ImageNet-V2 83.33 %, with the ReaL
labels 90.81 %. Expected with ten images of each class (Table 4): g 84.3 %, G 84.9 %.
Not verified: that e has the recipe of G. Its 100,000 steps of cool-down are from a summary of
PaLI, which repeats them with another crop and averages the two models. This recipe has one.

JFT-3B, some 3 billion images of 29,593 classes, is not public. Set --config.data.train to your own
copy or to a substitute.
"""

from vit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from vit_jax.errors import UserError, did_you_mean
from vit_jax.recipes import load_recipe
from vit_jax.settings.fields import with_settings

SMALL = ('s/28', 's/16', 'S/32', 'Ti/16', 'B/32', 'S/16', 'B/28', 'B/16', 'L/16')
# MODEL: (batch, steps, steps of the cool-down).
MODELS = {
  **dict.fromkeys(SMALL, (4096, 4_000_000, 50_000)),
  'g/14': (16_384, 1_000_000, 50_000),
  'G/14': (16_384, 1_000_000, 50_000),
  'e/14': (16_384, 1_000_000, 100_000),
}
FINETUNING_RATES = (0.01, 0.03)


def get_config(argument: str = 'G/14') -> Config:
  """Return the config for 'MODEL[,finetune_imagenet]'. Raises UserError for another argument."""
  model, comma, stage = argument.partition(',')
  if model not in MODELS or (comma and stage != 'finetune_imagenet'):
    near = did_you_mean(model, MODELS) if model not in MODELS else ''
    raise UserError(f'--config=scaling:{argument}: expected MODEL[,finetune_imagenet].{near}')
  return finetuning(model) if comma else pretraining(model)


def pretraining(model: str) -> Config:
  """Return the config of Appendix B. Models from g on are sharded over 16 devices."""
  batch, steps, cooldown = MODELS[model]
  return Config(
    data=DataConfig(
      train='folder:jft3b',
      split='train[50000:]',
      eval_split='train[:50000]',
      batch=batch,
      size=(224, 224),
      workers=16,
    ),
    model=ModelConfig(variant=model, pool='map', head_bias=-10.0, dtype='bfloat16', remat='vit'),
    optim=OptimConfig(
      name='adafactor',
      lr=8e-4,
      schedule='rsqrt',
      warmup='10000',
      cooldown=str(cooldown),
      rsqrt_timescale=10_000,
      momentum_dtype='bfloat16',
      weight_decay=0.03,
      head_weight_decay_factor=100.0,
      weight_decay_mask='.*/kernel',
      grad_clip_norm=1.0,
    ),
    mesh=MeshConfig(fsdp=1 if model in SMALL else 16),
    steps=steps,
    loss='sigmoid',
    eval_every='5000',
    save_every='5000',
  )


def finetuning(model: str) -> Config:
  """Return the config of Appendix D: that of the first paper, at 384 or 518 pixels.

  G's learning rate is constant and its parameters are averaged, with the first paper's decay.
  """
  settings = {'model.pool': 'map'}
  if model not in SMALL:
    settings |= {'data.size': (518, 518), 'model.remat': 'vit', 'mesh.fsdp': 16}
  if model == 'G/14':
    settings |= {'optim.schedule': 'constant', 'optim.ema': 0.9999}
  return with_settings(load_recipe(f'finetune:{model},imagenet'), settings)


def sweep_rates(argument: str = '') -> tuple[float, ...]:
  """Return the learning rates of Appendix D for 'MODEL,finetune_imagenet'."""
  return FINETUNING_RATES if argument.endswith(',finetune_imagenet') else ()
