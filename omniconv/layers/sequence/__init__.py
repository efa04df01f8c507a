"""Layers over sequences (N, C, L) with a long memory."""
