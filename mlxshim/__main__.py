"""`python -m mlxshim`: the doctor."""

import sys

from .doctor import main

sys.exit(main())
