"""Steps on the weights after training: ExPO, as a command and as a run's last step."""
