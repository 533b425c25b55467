"""The patch: what fine-tuning added to a base model, as deltas by module, and the record of where it comes from."""
