"""Is it good, is it calibrated, and how sure are we? Metrics, intervals, reliability, report."""
