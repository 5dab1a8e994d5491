"""What is no part of the package: compiling the CUDA kernels, reporting on them, and resuming long runs on a GPU."""
