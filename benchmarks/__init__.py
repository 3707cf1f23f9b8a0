"""`python -m benchmarks.NAME [--quick] --json FILE`: figures beside those of a named peer."""
