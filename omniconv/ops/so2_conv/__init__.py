"""Equivariant convolution of spherical-harmonic features along an edge."""
