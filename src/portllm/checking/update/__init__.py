"""What an update did to a base: lineage, configuration, drift."""
