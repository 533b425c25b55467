"""What needs a running model: reading examples, loading, LoRA training, full-weight evolution.

Rows of a file become `Example` values (`examples`, free of torch), those become token ids (`encoding`), and a model
that `model` loaded is trained on them (`train`) or on plain text (`evolve`). Only `model` imports transformers and
peft.
"""
