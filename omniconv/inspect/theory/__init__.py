"""Theorems about networks, as code that can be run."""
