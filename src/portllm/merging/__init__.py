"""A patch into weights, streamed in blocks of rows."""
