import sys

from qcow2x.cli.io import main

sys.exit(main())
