"""One executable claim a paper."""
