"""What goes beside the weights of an output: configuration and tokenizer files, and the manifest."""
