"""Training: one accelerate loop, exact resume, trackers."""

TRAINERS = {"next_item": "genrec.trainers.base:Trainer"}

__all__ = ["TRAINERS"]
