"""`python -m medusa_exporter`: the `medusa-export` command where it is not on the path."""

from medusa_exporter.cli import main

main()
