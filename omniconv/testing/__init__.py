"""The contract suite that every component passes, shipped for users' own components too.

    from omniconv.testing.layers import check_layer

    check_layer(Case(MyGate, {"channels": 6}, inputs=((2, 6, 7, 5),), output=(2, 6, 7, 5)))

One module a kind of component (`layers`, `models`, `ops`, `losses`, `transforms`, `artifacts`), each a tuple of
small named checks and one function that runs them all; `find` finds the components of a package.
"""
