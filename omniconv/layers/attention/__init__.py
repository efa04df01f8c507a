"""Gates and attention modules."""
