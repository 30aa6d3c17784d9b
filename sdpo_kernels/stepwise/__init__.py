"""The stepwise driver: stages, references, manifest, report (arXiv 2403.19270)."""
