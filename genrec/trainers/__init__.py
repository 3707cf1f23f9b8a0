"""Training: one accelerate loop, exact resume, trackers."""

TRAINERS = {
    "next_item": "genrec.trainers.base:Trainer",
    "instructions": "genrec.trainers.instructions:InstructionTrainer",
    "incremental": "genrec.trainers.incremental:Incremental",
    "preference": "genrec.trainers.preference:Preference",
}

__all__ = ["TRAINERS"]
