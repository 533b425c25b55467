"""Methods that carry a delta from the base it was made on to an evolved base: one file each, a row each in METHODS."""
