"""``python -m infra.cli``: the command without an installed script."""

from infra.cli import main

main()
