"""`python -m harness.cli`."""

import sys

from harness import ROOT
from harness.cli import main

sys.path[0] = str(ROOT)  # in place of the working directory, whose random.py is not Python's
sys.exit(main())
