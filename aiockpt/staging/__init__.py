"""Where tensors are copied into the ring: the host port, and later CUDA's."""
