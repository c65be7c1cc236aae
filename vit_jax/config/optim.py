"""The settings of the optimizer."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class OptimConfig:
  """The optimizer and its schedule. optim/optimizer.py builds them from optax."""

  # adamw, sgd, adafactor, rmsprop, lamb, lion, muon (AdamW for all but hidden matrices).
  name: str = 'adamw'
  # The peak learning rate.
  lr: float = 1e-3
  # cosine, linear, rsqrt, constant, staircase.
  schedule: str = 'cosine'
  # A duration: the learning rate grows linearly from 0.
  warmup: str = '0'
  # A duration: the learning rate falls linearly to `lr_end` in the last part of the run.
  cooldown: str = '0'
  # The learning rate at the end of the linear and cosine decays, and of the cool-down.
  lr_end: float = 0.0
  # The timescale of the rsqrt schedule in steps.
  rsqrt_timescale: int = 10_000
  # Durations from the start of the run after which a staircase falls: '30%,60%,90%'.
  lr_boundaries: str = ''
  # A duration: the staircase also falls after every multiple of it.
  lr_boundary_every: str = '0'
  # The factor of the learning rate at each boundary.
  lr_boundary_factor: float = 0.1
  # Adam's, LAMB's and Lion's beta1, and the momentum of SGD, RMSProp and Adafactor.
  b1: float = 0.9
  # Adam's, LAMB's and Lion's beta2, RMSProp's decay, and the limit of Adafactor's decay.
  b2: float = 0.999
  # The momentum of the matrices that Muon orthogonalizes.
  muon_momentum: float = 0.95
  # The type of the first moment: float32, bfloat16.
  momentum_dtype: str = 'float32'
  # Decoupled weight decay. It is multiplied by the learning rate, as in optax.adamw and the paper.
  weight_decay: float = 0.0
  # Adds weight decay to the gradient, before the momentum: the L2 penalty of SGD and RMSProp.
  coupled_weight_decay: bool = False
  # The factor of the weight decay of the head's kernel (arXiv 2106.04560: 100).
  head_weight_decay_factor: float = 1.0
  # The parameters with weight decay, and with LAMB's trust ratio: a regular expression that matches
  # the full path.
  weight_decay_mask: str = '.*'
  # Clips gradients to this global norm. 0 means no clipping.
  grad_clip_norm: float = 0.0
  # The parameters that are not trained: a regular expression that matches the full path. '' means
  # none.
  freeze: str = ''
  # The factor by which the learning rate falls from each block to the block before it.
  layer_decay: float = 1.0
  # The decay of a moving average of the parameters, which is then evaluated. 0 means none.
  ema: float = 0.0
  # The momentum of the running statistics of batch norm, for models that have them.
  norm_momentum: float = 0.99
  # The type in which gradients are summed over devices: float32, bfloat16 (half the bytes).
  grad_dtype: str = 'float32'
  # The number of parts into which a batch is split. They are computed in sequence.
  grad_accum_steps: int = 1
  # Skips a step whose loss or gradient norm exceeds the mean of the steps before by this many
  # standard deviations. 0 disables this.
  skip_spikes: float = 0.0
  # The number of steps over which the mean and the deviation are computed.
  spike_window: int = 128
  # SAM: the update uses the gradient at parameters this far away, uphill. 0 means off. A step takes
  # twice the time.
  sam_rho: float = 0.0
  # SAM's distance when the learning rate is `lr_end`; it falls with the learning rate. 0 means that
  # the distance is constant.
  sam_rho_min: float = 0.0
  # GSAM: how much of the gradient orthogonal to SAM's is subtracted. 0 means SAM.
  gsam_alpha: float = 0.0
  # The number of consecutive skipped steps (spikes, or not finite) that end the run.
  max_bad_steps: int = 10
