"""The command line: one program; each command gathers its options, calls the library and renders the result."""
