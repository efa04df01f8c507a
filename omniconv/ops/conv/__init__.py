"""Convolution lowered in different ways, in 1 and 2 dimensions."""
