"""Numbers from arrays, pure: drift, overlap, spectra, rounding."""
