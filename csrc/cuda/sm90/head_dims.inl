// The head_dims of the kernels for compute capability 9.0, ascending. Also read by the build and simulator.
64, 96, 128, 192, 256
