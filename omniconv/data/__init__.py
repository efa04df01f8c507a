"""Readers of real formats, what was found in them, splits, batches and augmentation."""
