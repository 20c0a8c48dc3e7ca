"""``python -m bonsai_image``: the command line (see ``standalone/cli.py``)."""

import sys

from .standalone.cli import main

sys.exit(main())
