"""What developers run beside build, tests and benchmarks; no part of an installation."""
