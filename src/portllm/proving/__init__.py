"""Whether a served patch does what it does here: measured in the real runtime."""
