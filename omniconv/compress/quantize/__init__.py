"""Quantization: weights and activations in a few bits, trained, calibrated or without any data."""
