"""One line for each operation, by family; `test_conformance.py` runs them all."""
