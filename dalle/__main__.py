"""``python -m dalle`` is the ``dalle`` command."""

from __future__ import annotations

import sys

from dalle.cli import main

sys.exit(main())
