"""Where tensors from disk meet the maths: plans, made from headers alone, and the runs that carry them out."""
