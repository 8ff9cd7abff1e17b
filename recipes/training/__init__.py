"""Training: pre-training, fine-tuning, segmentation, and what goes around them."""
