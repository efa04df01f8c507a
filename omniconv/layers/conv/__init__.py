"""Convolution modules."""
