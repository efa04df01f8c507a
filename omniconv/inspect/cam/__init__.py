"""Class activation maps: where in a picture a network looks."""
