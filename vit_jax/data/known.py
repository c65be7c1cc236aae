"""What well-known data sets have, for those who plan a run on a machine that doesn't hold them."""

# Training examples, classes, most labels of an example. arXiv 2010.11929 §4.1 (ImageNet-21k's and JFT-300M's images are rounded
# there), arXiv 2106.04560 (JFT-3B), and the TFDS catalogue.
KNOWN = {
  'tfds:imagenet2012': (1_281_167, 1_000, 1),
  'folder:imagenet21k': (14_000_000, 21_843, 1),
  'folder:jft': (303_000_000, 18_291, 1),
  'folder:jft3b': (3_000_000_000, 29_593, 1),
  'tfds:cifar10': (50_000, 10, 1),
  'tfds:cifar100': (50_000, 100, 1),
  'tfds:oxford_iiit_pet': (3_680, 37, 1),
  'tfds:oxford_flowers102': (2_040, 102, 1),  # Its training and validation splits.
}  # fmt: skip
