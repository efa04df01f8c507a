"""The contract suite that every component passes."""
