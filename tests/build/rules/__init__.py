"""Rules that the source tree is held to; tests/test_source_rules.py runs them."""
