"""Evaluation: FVD and KVD on I3D features, metrics of one clip, protocol cards.

Nothing is imported here: take what you need from `i3d`, `distances`, `clip_metrics` or `protocol`.
"""
