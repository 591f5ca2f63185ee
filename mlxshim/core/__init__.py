"""The machinery that every rule and transform stands on; it knows no operation."""
