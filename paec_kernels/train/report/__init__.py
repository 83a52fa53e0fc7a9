"""What came of it: evaluations, comparisons of runs, tables and plots."""
