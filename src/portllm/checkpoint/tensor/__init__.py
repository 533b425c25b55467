"""What a stored tensor is: dtype, shape, place, encoding."""
