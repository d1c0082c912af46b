"""S2DM: sector-shaped diffusion for video (arXiv 2403.13408).

The library behind the ComfyUI nodes. It never imports ComfyUI, and importing it loads nothing
heavy: take what you need from `s2dm.flow`, `s2dm.sector`, `s2dm.models` and so on.
"""
