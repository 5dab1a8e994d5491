// Of the kernels for compute capability 8.0 and later, ascending. The build, the simulator and its tools read it too.
64, 96, 128, 192, 256
