"""Evaluation: clips generated and measured, FVD and KVD on I3D features, protocol cards.

Nothing is imported here: take what you need from `run`, `modes`, `tables`, `clip_metrics`,
`distances`, `i3d` or `protocol`.
"""
