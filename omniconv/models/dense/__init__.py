"""Networks that put out one value for every pixel."""
