"""Factorization: layers as products and recurrences of smaller ones."""
