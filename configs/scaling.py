"""Pre-training of ViT-G/14: "Scaling Vision Transformers" (arXiv 2106.04560).

    python run_pretrain.py --config=configs/scaling.py:G/14 --config.data.train=folder:/data/jft3b

Argument: a variant. The recipe is that of the largest, G/14, which has 1.8 billion parameters. The
next is g/14.
Cost: G/14 takes a million steps of 16,384 images, 47,400 exaFLOPs, at 965 GFLOPs for a forward pass
of one image and three forward passes for a step. Not run here.
Expected after fine-tuning on ImageNet: 90.45 %, ImageNet-V2 83.33 %, with the ReaL labels 90.81 %.

JFT-3B, some 3 billion images of 29,593 classes, is not public. Set --config.data.train to your own
copy or to a substitute.
"""

from vit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config(argument: str = 'G/14') -> Config:
  """Return the config of a variant, with the train state sharded over 16 devices."""
  return Config(
    data=DataConfig(
      train='folder:jft3b',
      split='train[50000:]',
      eval_split='train[:50000]',
      batch=16_384,
      size=(224, 224),
      workers=16,
    ),
    model=ModelConfig(variant=argument, pool='map', head_bias=-10.0, dtype='bfloat16', remat='vit'),
    optim=OptimConfig(
      name='adafactor',
      lr=8e-4,
      schedule='rsqrt',
      warmup='10000',
      cooldown='50000',
      rsqrt_timescale=10_000,
      momentum_dtype='bfloat16',
      weight_decay=0.03,
      head_weight_decay_factor=100.0,
      weight_decay_mask='.*/kernel',
      grad_clip_norm=1.0,
    ),
    mesh=MeshConfig(fsdp=16),
    steps=1_000_000,
    loss='sigmoid',
    eval_every='5000',
    save_every='5000',
  )
