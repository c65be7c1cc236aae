"""Pre-train a Vision Transformer: `vit-jax train` with the default recipe quickstart.

python run_pretrain.py [--config=RECIPE[:ARGUMENT]] [--config.FIELD=VALUE ...] [--workdir=DIR]
"""

from vit_jax.cli.train import run_train_job
from vit_jax.runtime.huge_pages import restart_with_huge_pages

if __name__ == '__main__':
  restart_with_huge_pages()
  run_train_job('quickstart')
