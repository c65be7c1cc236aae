"""Sizes of well-known datasets, for planning a run on a machine that does not have the data.

This table is its own file because `tpu/plan.py` and `paper/` read it without the data pipeline.
"""

# Source, and a split if it is a part of the training data -> (training examples, classes, maximum
# labels per example). Sources: the TFDS catalogue, arXiv 2010.11929 §4.1 (which rounds ImageNet-21k
# and JFT-300M), arXiv 2106.04560 (JFT-3B).
DATASET_SIZES = {
  'tfds:imagenet2012': (1_281_167, 1_000, 1),
  'folder:imagenet21k': (14_000_000, 21_843, 1),
  'records:imagenet21k': (14_000_000, 21_843, 1),  # Packed from the folder.
  'folder:jft': (303_000_000, 18_291, 1),
  'folder:jft3b': (3_000_000_000, 29_593, 1),
  'tfds:cifar10': (50_000, 10, 1),
  'tfds:cifar100': (50_000, 100, 1),
  'tfds:oxford_iiit_pet': (3_680, 37, 1),
  'tfds:oxford_flowers102': (2_040, 102, 1),  # The training and validation splits together.
  'tfds:oxford_flowers102 train': (1_020, 102, 1),
  'tfds:food101': (75_750, 101, 1),
  'tfds:sun397': (76_128, 397, 1),
  'tfds:resisc45': (31_500, 45, 1),
  # VTAB-1k (arXiv 1910.04867).
  **{
    f'vtab:{task}': (1_000, classes, 1)
    for task, classes in {
      'caltech101': 102, 'cifar100': 100, 'dtd': 47, 'oxford_flowers102': 102,
      'oxford_iiit_pet': 37, 'sun397': 397, 'svhn': 10,
      'patch_camelyon': 2, 'eurosat': 10, 'resisc45': 45, 'diabetic_retinopathy': 5,
      'clevr_count': 8, 'clevr_distance': 6, 'dmlab': 6, 'dsprites_location': 16,
      'dsprites_orientation': 16, 'kitti_distance': 4, 'smallnorb_azimuth': 18,
      'smallnorb_elevation': 9,
    }.items()
  },
}  # fmt: skip
