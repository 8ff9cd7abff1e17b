"""Generating: what is drawn from a network's predictions, and what stands beside it."""
