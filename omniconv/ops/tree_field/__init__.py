"""Products with functions of the distances on a tree, in near-linear time."""
