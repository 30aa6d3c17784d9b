"""What the policy is compared with: reference log-probs and evaluation pairs."""
