"""Pure functions of tensors: no config, no models, no input or output."""
