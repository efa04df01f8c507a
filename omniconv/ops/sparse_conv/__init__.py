"""Convolution of sparse maps: only active sites are stored, only pairs of active sites are multiplied."""
