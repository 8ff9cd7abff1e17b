"""Comparisons over seeds: orders, objectives, ablations, and the engine that runs them."""
