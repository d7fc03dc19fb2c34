"""Drop-in PyTorch optimizers."""
