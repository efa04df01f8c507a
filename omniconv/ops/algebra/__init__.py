"""Convolution over any semiring and any monoid: languages, polynomials and images are instances of one operation."""
