"""Judge a set of images or clips; knows tensors and files, nothing of diffusion."""
