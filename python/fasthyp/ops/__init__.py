"""PyTorch operators over the compiled kernels, one module per kernel family."""
