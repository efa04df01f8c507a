"""Binary networks: weights of one bit, and what can be computed once for all of them."""
