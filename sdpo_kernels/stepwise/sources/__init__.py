"""Where a stage's pairs come from when they are made instead of read: samples of the policy and a judge."""
