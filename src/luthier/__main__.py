"""`python -m luthier` is the command `luthier`; launchers such as torchrun need a module."""

import sys

from luthier.cli import main

sys.exit(main())
