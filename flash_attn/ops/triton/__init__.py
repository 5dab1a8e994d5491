"""Names of upstream Triton operators, over plain torch code that runs everywhere."""
