"""ComfyUI-S2DM: flow-guided video with sector-shaped diffusion (arXiv 2403.13408).

ComfyUI asks for `comfy_entrypoint`; the nodes are imported there and not before, so that this
package can be imported where there is no ComfyUI.
"""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():
    """Return the extension that holds the nodes of the pack."""
    from .nodes import S2DMExtension

    return S2DMExtension()
