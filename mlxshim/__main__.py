"""`python -m mlxshim`: the doctor."""

import os
import sys

from .doctor import main

try:
    status = main()
    sys.stdout.flush()
except BrokenPipeError:  # nobody reads on: `| head`
    # What is still buffered would be written, and refused, at exit once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 128 + 13  # as of one that SIGPIPE has ended
sys.exit(status)
