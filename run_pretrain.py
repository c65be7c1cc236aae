"""Pre-trains a Vision Transformer.

python run_pretrain.py [--config=configs/NAME.py[:ARGUMENT]] [--config.FIELD=VALUE …] [--workdir=DIR]
"""

from pathlib import Path

from vit_jax.cli.jobs import run_train_job

if __name__ == '__main__':
  run_train_job(Path(__file__).parent / 'configs' / 'quickstart.py')
