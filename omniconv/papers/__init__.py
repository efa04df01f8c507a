"""One record a paper, one executable check a claim, and what was measured."""
