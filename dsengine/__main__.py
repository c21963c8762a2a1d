"""`python -m dsengine` is the `dsengine` command, for environments whose script folder is not on the path."""

from __future__ import annotations

import sys

from dsengine.cli import main

sys.exit(main())
