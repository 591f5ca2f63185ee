"""What only some versions of MLX import is collected there only."""

import os

# On CUDA float32 products would have ten bits, and differ by how they are batched.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx

from mlxshim.core.versions import MLX

collect_ignore = ["mlxshim/rules/plain_0_31.py"] if MLX >= (0, 32, 0) else []
collect_ignore.append(f"mlxshim/rules/{'sorting' if MLX >= (0, 32, 4) else 'partitions'}.py")
if not hasattr(mx, "searchsorted"):
    collect_ignore.append("mlxshim/rules/searching.py")
