"""What a model looks at: activation maps, filters, receptive fields."""
