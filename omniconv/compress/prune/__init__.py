"""Pruning: which weights, channels or layers a model can do without."""
