"""The names that model files go by."""

SINGLE_FILE = "model.safetensors"

INDEX_FILE = "model.safetensors.index.json"

GGUF_SUFFIX = ".gguf"
