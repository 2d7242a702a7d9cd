"""``python -m xfuser.cli``: what ``xdit`` is, for launchers that start a module."""

import sys

from xfuser.cli.main import main

sys.exit(main())
