"""An OpenCV that is there and doesn't work, as broken installations leave it."""

import importlib
import sys

import pytest
import torch

from s2dm.flow import FlowError, estimate_flow


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (None, r"cv2 is not all of it"),  # a folder without a file
        ("", r"__init__\.py is not all of it"),
        ("raise ImportError('DLL load failed while importing cv2')", "DLL load failed"),
        ("raise OSError('libGL.so.1: cannot open shared object file')", r"libGL\.so\.1"),
        ("raise AttributeError('_ARRAY_API not found')", "_ARRAY_API not found"),
        ("raise RuntimeError()", r"RuntimeError\(\)"),
    ],
)
def test_the_error_says_what_is_wrong_and_what_to_do(tmp_path, monkeypatch, code, reason):
    (tmp_path / "cv2").mkdir()
    if code is not None:
        (tmp_path / "cv2" / "__init__.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    importlib.invalidate_caches()
    frames = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    try:
        with pytest.raises(FlowError, match=rf"need OpenCV.*{reason}.*python install\.py"):
            estimate_flow(frames)
    finally:
        sys.modules.pop("cv2", None)
