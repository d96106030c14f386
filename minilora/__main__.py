"""``python -m minilora`` is the command ``minilora``."""

import sys

from .cli import main

sys.exit(main())
