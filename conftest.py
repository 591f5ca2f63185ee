"""What only an old MLX imports is collected there only."""

from mlxshim.core.versions import MLX

collect_ignore = ["mlxshim/rules/plain_0_31.py"] if MLX >= (0, 32, 0) else []
if MLX >= (0, 32, 4):
    collect_ignore.append("mlxshim/rules/sorting.py")
