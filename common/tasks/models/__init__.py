"""Models: which tensors each has, and how each is built."""
