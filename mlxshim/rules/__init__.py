"""The rules: one file a family of operations. Importing a family registers its interceptions."""

from . import attention as attention
