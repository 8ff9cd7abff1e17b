"""Runs to the released Hugging Face layout, and that layout to runs."""
