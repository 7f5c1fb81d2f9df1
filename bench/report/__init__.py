"""What was measured, as a page: `python -m bench.report`."""
