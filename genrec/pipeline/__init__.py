"""The stages of a run, their cache, and what a run leaves behind."""
