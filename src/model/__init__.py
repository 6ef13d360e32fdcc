"""The network that is fine-tuned."""
