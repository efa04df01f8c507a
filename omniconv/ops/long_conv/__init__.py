"""Convolution with kernels as long as the sequence, or as large as the map."""
