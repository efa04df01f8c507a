"""Normalisation modules."""
