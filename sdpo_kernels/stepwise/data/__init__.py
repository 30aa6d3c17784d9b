"""From data files to batches: raw rows, pairs, tokens, order, batches."""
