"""A bound on what a port can have lost, from unlabeled inputs."""
