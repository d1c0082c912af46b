"""Optical flow: the field, its estimation from frames, its colours and its files."""

from .field import FlowError, FlowField

__all__ = ["FlowError", "FlowField"]
