"""The transforms: MLX's own, wrapped so that every rule takes part."""
