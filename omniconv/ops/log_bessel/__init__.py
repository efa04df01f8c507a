"""Logarithms of the modified Bessel functions I and K."""
