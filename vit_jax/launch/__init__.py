"""TPU pods: what there is, whether a run fits one, and how it is started there."""
