"""Layers for functions on spheres and features that turn with space."""
