"""``python -m xfuser.cli``: the same as ``xdit``, for launchers that start a module."""

import sys

from xfuser.cli.main import main

sys.exit(main())
