"""Plain PyTorch twins of the kernels: the oracle of their tests and the path for what they lack."""
