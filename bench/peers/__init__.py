"""Programs of others that are measured beside ours. None of them is imported: each runs in a process of its own."""
