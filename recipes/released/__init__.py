"""The released Hugging Face layout: reading, writing, and weights from runs or from it."""
