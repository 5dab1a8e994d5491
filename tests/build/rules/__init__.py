"""Rules of the source tree; tests/build/test_source_rules.py runs them."""
