"""One stage's Trainer: its callbacks, its checkpoints, the checks at its start, and publishing what it trained."""
