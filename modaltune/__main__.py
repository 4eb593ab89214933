"""`python -m modaltune`: the command line, where its script is not on the path."""

from modaltune.cli import main

main()
