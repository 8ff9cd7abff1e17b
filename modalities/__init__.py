"""Adapters: kinds of data that the method can learn from, and where their samples come from."""
