"""What programs that serve models take of a patch: data, read in their sources."""
