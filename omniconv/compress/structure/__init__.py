"""Structure: which channels of a network belong together, and networks without some of them."""
