"""`python -m omniconv`, and `torchrun -m omniconv` for several processes."""

from omniconv.cli import main

main()
