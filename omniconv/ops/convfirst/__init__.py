"""The ConvFirst block as one operator."""
