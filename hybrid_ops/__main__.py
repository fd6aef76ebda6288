"""`python -m hybrid_ops`, the same as `hybrid-ops`."""

import sys

from .cli import main

sys.exit(main())
