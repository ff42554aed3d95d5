"""Everything that touches weights, latents and files. No UI and no ComfyUI from here down."""
