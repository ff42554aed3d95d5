"""Everything that touches weights, latents and files. No UI and no ComfyUI from here down."""

VERSION = "0.1.0"  # as in pyproject.toml; a test compares
