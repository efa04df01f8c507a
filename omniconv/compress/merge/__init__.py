"""Merging: several networks in one, or several inputs through one network at once."""
