"""Clusters of this machine's own."""

from tests.clusters import cluster, environment  # noqa: F401 (fixtures)
