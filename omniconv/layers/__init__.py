"""Modules: convolutions, gates and attention, norms, pools."""
