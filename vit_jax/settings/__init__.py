"""Facts about the settings: their choices, ranges and conditions, and their names."""
