"""What training costs, as the paper counts it (arXiv 2010.11929, Tables 2 and 6): exaFLOPs and TPUv3-core-days.

A step is three forward passes, a multiply-add is 2 FLOPs, and a forward pass is the model's own `shape.flops`.
"""

CORE = 61.5e12  # bfloat16 FLOP/s of a TPUv3 core: 123e12 a chip of two.
# The share of the peak that a run is taken to reach where nobody has measured or planned it. Table 2's core-days of ViT-H/14,
# L/16 on JFT-300M and L/16 on ImageNet-21k, over the exaFLOPs of those runs, are 32, 43 and 38 %.
MFU = 0.4


def exaflops(flops: float, images: float) -> float:
  """Of training on so many `images`, each as often as it is seen; `flops` are a forward pass's over one."""
  return 3 * flops * images / 1e18


def core_days(exaflops: float, mfu: float = MFU) -> float:
  """TPUv3 cores times days, at that share of their peak."""
  return exaflops * 1e18 / (mfu * CORE) / 86400


def chip_hours(exaflops: float, peak: float, mfu: float = MFU) -> float:
  """Chips of `peak` FLOP/s times hours, at that share of it."""
  return exaflops * 1e18 / (mfu * peak) / 3600
