"""From data files to batches: raw rows, pairs, tokens, order of the stages, batches."""
