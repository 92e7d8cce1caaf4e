"""``python -m svip.cli``."""

from svip.cli import main

main()
