"""``python -m qcow2x`` is the ``qcow2x`` command."""

import sys

from qcow2x.cli.main import main

sys.exit(main())
