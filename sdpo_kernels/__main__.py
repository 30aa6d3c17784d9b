"""`python -m sdpo_kernels …` is the same as `sdpo …`, for torchrun, which starts modules.

`info` needs the kernels alone; the other commands need the extra `train`.
"""

import sys
from importlib.util import find_spec

NEEDED = (
    "typer", "pydantic", "ruamel", "rich", "transformers", "accelerate", "peft", "datasets", "huggingface_hub",
    "safetensors", "matplotlib", "tensorboard",
)  # fmt: skip


def main() -> None:
    """Entry point of `sdpo`. Without the extra `train` it ends with one line and exit code 2."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing and sys.argv[1:] == ["info"]:
        from sdpo_kernels.info import info_text

        print(info_text())
        return
    if missing:
        print(
            f"error: sdpo needs more than the kernels; not installed: {', '.join(missing)}; "
            "run: pip install sdpo-kernels[train] (`python -m sdpo_kernels info` works without)",
            file=sys.stderr,
        )
        sys.exit(2)

    from sdpo_kernels.cli import main as command

    command()


if __name__ == "__main__":
    main()
