"""GPU kernels: one concept a file, each a pure function over tensors on the device."""
