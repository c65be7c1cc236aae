"""ViT-G/14 as "Scaling Vision Transformers" pre-trained it (arXiv 2106.04560): 1.8 billion parameters on JFT-3B.

    python run_pretrain.py --config=configs/scaling.py:G/14 --config.data.train=folder:/data/jft3b

Argument: a variant, of which the paper's largest are g/14 and G/14; the recipe is that of the largest.
Cost: for G/14 a million steps of 16,384 images are 47,400 exaFLOPs, three forward passes of 965 GFLOPs an image.
Expected: after fine-tuning on ImageNet 90.45 %, on its V2 83.33 %, with the ReaL labels 90.81 %. Not run here.

JFT-3B, some 3 billion images of 29,593 classes, is not public: point --config.data.train at your own copy or stand-in.
"""

from vit_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def get_config(argument: str = 'G/14') -> Config:
  """The recipe for that variant. Parameters, momentum and factored second moments are over 16 devices."""
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
