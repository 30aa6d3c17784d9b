"""What a run keeps of itself: manifest.json, metrics.jsonl, model cards."""
