"""What theory says beside what was measured: every function returns rows of `comparison.Comparison`."""
