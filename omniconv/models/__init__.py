"""Whole networks, by domain."""
