"""One stage's Trainer: callbacks, checkpoints, checks at its start."""
