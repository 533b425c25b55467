"""Several patches into one."""
