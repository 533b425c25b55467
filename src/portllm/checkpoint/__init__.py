"""Model files on disk, as named tensors that are read one at a time: header, reader, writer, identity."""
