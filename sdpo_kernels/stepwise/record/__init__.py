"""The records of a run: manifest.json, metrics.jsonl, its environment, model cards."""
