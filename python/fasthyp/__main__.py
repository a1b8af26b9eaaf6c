"""``python -m fasthyp``: the command line."""

import sys

from fasthyp.cli import main

sys.exit(main())
