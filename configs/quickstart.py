"""A small ViT on the built-in Fashion-MNIST."""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
  return Config(
    data=DataConfig(train='builtin:fashion_mnist', batch=128, eval_batch=500, size=(28, 28), crop='resize'),
    model=ModelConfig(variant='Ti/7', width=128, depth=6, mlp=256, heads=4, pool='gap', unroll=0),
    optim=OptimConfig(name='adamw', lr=2e-3, schedule='cosine', warmup='5%', weight_decay=0.05, clip=1.0),
    steps=1200,
    log_every='50',
  )
