"""Language models trained with truncated backpropagation through time."""
