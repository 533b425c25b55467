"""What a checkpoint, adapter or patch is."""
