"""Benchmarks: `python -m benchmarks.NAME [--quick] --json FILE`; each compares with a named peer."""
