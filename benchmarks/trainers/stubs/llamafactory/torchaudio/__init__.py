"""A stub: LLaMA-Factory imports torchaudio at its top and uses it for audio only."""
