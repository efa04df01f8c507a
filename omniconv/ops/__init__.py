"""Functional operators: a reference that reads like the equation, fast implementations beside it."""
