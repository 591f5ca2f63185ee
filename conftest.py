"""What only an old MLX imports is collected there only."""

import os

# On CUDA float32 products would have ten bits, and differ by how they are batched.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx

from mlxshim.core.versions import MLX

collect_ignore = ["mlxshim/rules/plain_0_31.py"] if MLX >= (0, 32, 0) else []
if MLX >= (0, 32, 4):
    collect_ignore.append("mlxshim/rules/sorting.py")
if not hasattr(mx, "searchsorted"):
    collect_ignore.append("mlxshim/rules/searching.py")
