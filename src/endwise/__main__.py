"""`python -m endwise` is the command line."""

from endwise.cli import main

main()
