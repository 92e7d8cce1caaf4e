"""What docs/ states as measured: one command each, `python -m benchmarks.NAME` from the checkout."""
