"""Training cost as the paper counts it (arXiv 2010.11929, Tables 2 and 6).

ExaFLOPs and TPUv3-core-days.

`training/program.py` counts the FLOPs. A multiply-add is 2 FLOPs.
"""

TPU_V3_CORE_FLOPS = 61.5e12  # bfloat16 FLOP/s of a TPUv3 core: 123e12 a chip of two.
# Assumed share of the peak where it is neither measured nor planned. Table 2's core-days of
# ViT-H/14, L/16 on JFT-300M and L/16 on ImageNet-21k, over the exaFLOPs of those runs, give 32, 43
# and 38 %.
ASSUMED_MFU = 0.4


def core_days(exaflops: float, mfu: float = ASSUMED_MFU) -> float:
  """Return TPUv3 cores times days, at a share `mfu` of their peak."""
  return exaflops * 1e18 / (mfu * TPU_V3_CORE_FLOPS) / 86400


def chip_hours(exaflops: float, peak: float, mfu: float = ASSUMED_MFU) -> float:
  """Return chips of `peak` FLOP/s times hours, at a share `mfu` of their peak."""
  return exaflops * 1e18 / (mfu * peak) / 3600
