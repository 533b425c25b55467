"""`python -m portllm` is the program `portllm`."""

from portllm.cli.main import main

main()
