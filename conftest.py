"""What only old, or only new versions of MLX serve is collected there only."""

from mlxshim.core.versions import MLX

collect_ignore = ["mlxshim/nn/clipping.py"] if MLX < (0, 32, 0) else []
if MLX >= (0, 32, 0):
    collect_ignore.append("mlxshim/rules/plain_0_31.py")
if MLX >= (0, 32, 4):
    collect_ignore.append("mlxshim/rules/sorting.py")
