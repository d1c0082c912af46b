"""The only code of the pack that touches ComfyUI's model classes.

It clones, and patches through ModelPatcher, NOISE and SAMPLER objects; it never assigns to a
name of ComfyUI. Versions are told apart by what they can do, not by their number.
"""
