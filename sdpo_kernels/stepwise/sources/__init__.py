"""Sources of generated pairs: the policy's samples, ranked by a judge."""
