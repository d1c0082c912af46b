"""Which files are clips: one table for the reader, for data folders and for messages."""

from __future__ import annotations

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".gif", ".apng"),
    *(".mpg", ".mpeg", ".m2ts", ".mts", ".ogv", ".wmv", ".flv"),
)
"""Files that hold a clip."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")
"""Files that hold a picture, and so a frame of a folder."""

MOVING_SUFFIXES = (".png", ".webp", ".avif")
"""Those of the pictures that may be animated, and then are a clip; only the file itself says so."""
