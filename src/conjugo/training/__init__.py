"""Training: data, models and the loop that brings them together with an optimizer."""
