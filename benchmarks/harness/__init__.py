"""What bench.py is made of: cases, providers, timing, comparison, results, reports."""
