"""Pooling modules."""
