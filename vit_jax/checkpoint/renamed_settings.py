"""The names that settings had in older versions, for reading older run directories."""

# Old name -> new name. Older run directories have the old names.
RENAMED_SETTINGS = {
  'keep': 'max_to_keep',
  'evals': 'probes',
  'evals_every': 'probe_every',
  'optim.clip': 'optim.grad_clip_norm',
  'optim.accumulate': 'optim.grad_accum_steps',
  'optim.drop_at': 'optim.lr_boundaries',
  'optim.drop_every': 'optim.lr_boundary_every',
  'optim.drop': 'optim.lr_boundary_factor',
  'optim.frozen': 'optim.freeze',
  'optim.couple_decay': 'optim.coupled_weight_decay',
  'optim.decay': 'optim.weight_decay_mask',
  'optim.head_decay': 'optim.head_weight_decay_factor',
  'data.per_class': 'data.unlabelled_per_class',
  'data.confidence': 'data.confidence_threshold',
  'data.bad_budget': 'data.max_bad_fraction',
  'data.operations': 'data.randaug_ops',
  'data.magnitude': 'data.randaug_magnitude',
  'data.crop_from': 'data.resize_before_crop',
}


def rename_settings(values: dict) -> dict:
  """Return a copy of a config as nested dicts, with new names for `RENAMED_SETTINGS`."""
  values = {name: dict(v) if isinstance(v, dict) else v for name, v in values.items()}
  for old, new in RENAMED_SETTINGS.items():
    group, _, name = old.rpartition('.')
    table = values.get(group) if group else values
    if isinstance(table, dict) and name in table:
      table[new.rpartition('.')[2]] = table.pop(name)
  return values
