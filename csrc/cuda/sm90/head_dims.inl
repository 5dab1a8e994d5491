// Of the kernels for compute capability 9.0, ascending. The build, the simulator and its tools read it too.
64, 96, 128, 192, 256
