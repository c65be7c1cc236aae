"""Fine-tunes the quickstart's model on 1,000 digits."""

from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
  model = ModelConfig(variant='Ti/7', width=128, depth=6, mlp=256, heads=4, pool='gap', unroll=0)
  return Config(
    data=DataConfig(
      train='builtin:digits', split='train[:1000]', eval_split='test', batch=100, size=(56, 56), crop='inception', flip=False
    ),
    model=model,
    optim=OptimConfig(name='sgd', lr=0.03, schedule='cosine', warmup='10%', clip=1.0),
    steps=200,
    init='runs/quickstart-*',
    log_every='20',
    eval_every='0',
    save_every='0',
  )
