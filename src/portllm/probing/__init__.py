"""What a patch does to the outputs of both models on prompts: `check --text`."""
