"""Names that OpenRLHF imports; calling one is an error."""

from einops import rearrange

__all__ = ["index_first_axis", "pad_input", "rearrange", "unpad_input"]


def index_first_axis(*args, **kwargs):
    raise NotImplementedError("flash_attn: is a stub here, packed samples need the real one")


pad_input = unpad_input = index_first_axis
