"""What the benchmark scripts share: cases, implementations, timing, memory, machine description, reports."""
