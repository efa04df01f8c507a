"""Cost models, scaling rules and architecture search spaces."""
