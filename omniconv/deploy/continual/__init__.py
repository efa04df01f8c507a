"""Continual inference: networks for clips that take one frame at a time."""
