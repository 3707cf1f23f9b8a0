"""Codes of more items than fit into memory: vectors from a file, codes to a file."""
