"""The inverse of a convolution that is padded at one corner."""
