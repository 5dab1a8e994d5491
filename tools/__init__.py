"""What developers run beside build, tests and benchmarks: the report on the kernels, the first look at a GPU."""
