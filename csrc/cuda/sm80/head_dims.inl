// The head_dims of the kernels for compute capability 8.0 and later, ascending. Also read by the build and simulator.
64, 96, 128, 192, 256
