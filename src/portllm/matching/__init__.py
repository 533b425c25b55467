"""Do a patch and a model fit together, tensor by tensor? From headers."""
