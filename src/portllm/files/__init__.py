"""Files of every kind: JSON, TOML, seals, caches, and outputs that appear whole or not at all."""
