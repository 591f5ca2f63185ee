"""Random programs of MLX operations under random nestings of transforms, against the loop."""
