"""What is done to the weights after a stage or a run."""
