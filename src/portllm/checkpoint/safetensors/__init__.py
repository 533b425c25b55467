"""Safetensors files and folders, read and written."""
