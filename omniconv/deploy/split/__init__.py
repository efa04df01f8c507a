"""Split computing: a device runs the first layers and sends few bytes; a server runs the rest."""
