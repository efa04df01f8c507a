"""Graph algorithms without parameters."""
