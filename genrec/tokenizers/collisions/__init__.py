"""Collision policies, and where items go that come after the index was built."""
