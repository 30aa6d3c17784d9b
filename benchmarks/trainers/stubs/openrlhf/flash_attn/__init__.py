"""Only what OpenRLHF imports at its top, for packed samples: flash-attn itself needs CUDA."""
