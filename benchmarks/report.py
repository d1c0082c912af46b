"""Write docs/results.md from the JSON files in docs/results: figures, pictures, commands.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ablation
import adapter_quick
import drawing
import drawn_motion
import flow_estimators
import flow_generation
import joining
import joining_lora
import limits
import noise_in_training
import pose
import table1
import two_stage
from common import RESULTS, ROOT
from flow_following import TARGET_ERROR, TARGET_FLICKER, TARGET_WARP_ERROR, TITLES
from import_time import TARGET as TARGET_IMPORT
from speed import TARGET as TARGET_MEMORY

from s2dm.evaluation.protocol import protocol_markdown
from s2dm.evaluation.tables import markdown_table

_HEAD = """# Results

Every figure carries its protocol and the command that makes it. The tables are written by
`python benchmarks/report.py` from the files in [`results`](results).
"""
_OLDER = "s2dm-puppets-v2.safetensors"
_OLDER_NOTE = f"""
Where a protocol names {_OLDER}, the figures are those of the checkpoint that was
bundled before today's. Autoencoder, text encoder and stage 1 are the same; its flow adapter had
channel fusion, and its U-Net had seen people at one place only. Under b8d4aa1e0b29 and 48235e09a9d8
it has the same weights, and recommends an anchor only under the second. Commit 404b9d23945c of this
repository has that file; there the commands beside such figures repeat them.
"""


def main() -> None:
    target = ROOT / "docs" / "results.md"
    target.write_text(page(), "utf-8")
    print(target)


def page() -> str:
    parts = []
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(section(json.loads(path.read_text("utf-8"))))
    older = _OLDER_NOTE if any(_OLDER in part for part in parts) else ""
    return "\n".join([_HEAD + older, *parts])


def _flow_following(result: dict[str, Any]) -> str:
    table = result["table"]
    lines = [
        "## Flow following and stillness",
        "",
        _sheet(result, "Sheet of held-out puppets"),
        "",
        "Held-out puppets: for each clip the true frames, the flow that was given, and what the "
        "model makes of caption and flow as it recommends, anchored to frame 1, which it draws "
        "first, after a key frame. *Plain* is the paper's method, without anchors.",
        "",
        markdown_table(table, TITLES),
        "",
    ]
    shared = table["given-flow"]
    lines += [
        *(f"{note}\n" for note in result["notes"]),
        f"- Flow error at most {TARGET_ERROR} of the motion: "
        f"{shared['flow_error']:.2f}, {_met(shared['flow_error'] <= TARGET_ERROR)}.",
        f"- Flicker of the background at most {TARGET_FLICKER:g} of 255: "
        f"{shared['flicker']:.1f}, {_met(shared['flicker'] <= TARGET_FLICKER)}.",
        f"- Warp error at most {TARGET_WARP_ERROR:g} of 255: "
        f"{shared['warp_error']:.1f}, {_met(shared['warp_error'] <= TARGET_WARP_ERROR)}.",
        "",
    ]
    return "\n".join(lines) + _protocol(result)


def _speed(result: dict[str, Any]) -> str:
    lines = [
        "## Speed and memory",
        "",
        "| frames | at a time | ms a frame and step | peak memory, MiB | of it added by sampling |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['frames']} | {row['chunk']} | {1000 * row['seconds_per_frame_and_step']:.0f} | "
        f"{row['peak_mib']:.0f} | {row['added_mib']:.0f} |"
        for row in result["rows"]
    ]
    ratio = result["peak_ratio"]
    lines += [
        "",
        f"- Peak of 128 frames at most {TARGET_MEMORY} of that of 16 with the same chunk: "
        f"{ratio:.2f}, {_met(ratio <= TARGET_MEMORY)}.",
        "",
    ]
    return "\n".join(lines) + _protocol(result)


def _drawing(result: dict[str, Any]) -> str:
    lines = [
        "## Drawing motion",
        "",
        "| camera | frames | s | s of the processor | memory, MiB | flow, MiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {drawing.CAMERAS[row['camera']]} | {row['frames']} | {row['seconds']:.2f} | "
        f"{row['processor_seconds']:.2f} | {row['added_mib']:.0f} | {drawing.flow_mib(row):.0f} |"
        for row in result["rows"]
    ]
    few, many = result["rows"][:2]
    seconds, growth = many["seconds"], drawing.growth(few, many)
    target = drawing.TARGET
    lines += [
        "",
        f"- Ten layers in {many['frames']} frames of 512x512 in at most {target:g} s by the clock: "
        f"{seconds:.2f} s, {_met(seconds <= target)}.",
        f"- Memory of a frame more at most {drawing.TARGET_GROWTH} times its flow: {growth:.2f}, "
        f"{_met(growth <= drawing.TARGET_GROWTH)}.",
        *(f"- {note}" for note in result.get("notes", [])),
        "",
    ]
    return "\n".join(lines) + _protocol(result)


def _drawn_motion(result: dict[str, Any]) -> str:
    table = result["table"]
    lines = ["| drawn | flow error / motion | the picture warped |", "|---|---|---|"]
    lines += [
        f"| {row['title']} | {row['generated']:.2f} | {row['warped']:.2f} |"
        for row in result["motions"]
    ]
    error = table["generated"]["flow_error"]
    return _section(
        result,
        "Drawn motion",
        _sheet(result, "Twelve drawn motions"),
        "Motions that were drawn on first frames of held-out puppets: for each the drawn flow, "
        "and what the model makes of picture, caption and flow, anchored to the picture. *Warped* "
        "is the picture moved by the flow, its holes filled: what the estimator itself gets wrong.",
        markdown_table(table, drawn_motion.TITLES),
        "\n".join(lines),
        f"- Flow error of the ten people at most {drawn_motion.TARGET} of the motion: {error:.2f}, "
        f"{_met(error <= drawn_motion.TARGET)}.\n"
        "- Where the camera moves, all of the picture counts, walls without texture too, on which "
        "the estimator finds little even in the warped picture; and the model was trained before "
        "a camera that stands still. Else the smaller what moves, the more is lost: a forearm is "
        "a cell or two of the latents wide.",
    )


def _import_time(result: dict[str, Any]) -> str:
    lines = ["## Import time", "", "| | median, s | range, s | processor, s |", "|---|---|---|---|"]
    for name in ("pack", "library"):
        if name in result:
            row = result[name]
            low, high = row["range_s"]
            lines.append(
                f"| {name} | {row['median_s']:.2f} | {low:.2f} to {high:.2f} | "
                f"{row['processor_s']:.2f} |"
            )
    if "pack" in result:
        seconds = result["pack"]["median_s"]
        lines += [
            "",
            f"- The pack adds at most {TARGET_IMPORT} s to ComfyUI's start: {seconds:.2f} s, "
            f"{_met(seconds <= TARGET_IMPORT)}.",
        ]
    lines += ["", "The pack needs a ComfyUI: `COMFYUI_PATH`, or `--comfyui FOLDER`."]
    return "\n".join([*lines, ""]) + _protocol(result)


def _section(result: dict[str, Any], title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"## {title}", *paragraphs, ""]) + _protocol(result).lstrip("\n")


def _sheet(result: dict[str, Any], title: str) -> str:
    """The picture; `sheet_frames` is in files whose sheet was made when sheets left frames out."""
    picture = f"![{title}](results/{result['sheet']})"
    if "sheet_frames" not in result:
        return picture
    frames = result["protocol"]["frames"]
    return f"{picture}\n\n*Shown are {result['sheet_frames']} of the {frames} frames of each clip.*"


def _protocol(result: dict[str, Any]) -> str:
    return "\n" + protocol_markdown(result["protocol"]) + "\n"


def _flow_generation(result: dict[str, Any]) -> str:
    return _section(
        result,
        "Stage 1: flow from prompt and first frame",
        _sheet(result, "True and generated flow"),
        "Held-out puppets: for each clip the true frames, their flow, and what stage 1 makes of "
        "the prompt and the first frame.",
        flow_generation.markdown(result["table"]),
    )


def _two_stage(result: dict[str, Any]) -> str:
    return _section(
        result,
        "Text to video in two stages",
        _sheet(result, "Twelve prompts"),
        "Twelve prompts that training never saw, drawn and sampled by the seeds 0 to 11 and not "
        "selected, above the flow that stage 1 made for them.",
        two_stage.markdown(result),
    )


def _limits(result: dict[str, Any]) -> str:
    motion, rooms, outfits = (
        _sheet({**result, "sheet": result["sheets"][name]}, title)
        for name, title in (
            ("motion", "Other places, sizes and cameras, and two clips of another kind"),
            ("rooms", "Clips from captions alone"),
            ("outfits", "Outfits of the cast, and others"),
        )
    )
    return _section(
        result,
        "Limits of the bundled checkpoint",
        motion,
        "For each kind of clip the given frames, their flow, and what the model makes of it: from "
        "a caption, from the clip's first frame, and from that without the flow adapter. Of the "
        "two clips of another kind flow and clip from the caption alone are shown. Of the clips "
        "it was last trained on, six in ten are like the first kind; in the others people stand "
        "elsewhere, half of them before a camera that pans and zooms. Beside the figures stand "
        "those of the true clips, of the true clips encoded and decoded, and of what an anchor "
        "draws frames towards, the first frame moved by the flow, its holes filled, decoded too: "
        "what estimator, autoencoder and warping get wrong, before anything is sampled.",
        rooms,
        "Clips from captions alone, anchored, with the largest change of a still part of the room.",
        outfits,
        "First frames in clothes that the cast wears, and in clothes that nobody wears.",
        limits.markdown(result["table"]),
    )


def _table1(result: dict[str, Any]) -> str:
    return _section(
        result,
        "Table 1: given flow, two stages, baselines",
        _sheet(result, "Given flow and two stages"),
        "Held-out puppets: for each clip the true frames, their flow, what the model makes of "
        "caption and flow, and what it makes of the caption alone, which has a flow of its own. "
        "Below them what the [baselines](training.md#baselines) make of the caption; LVDM knows "
        "none. Warping shares frame 1 and the flow with our two stages and has nothing that paints "
        "what frame 1 hides.",
        table1.markdown(result),
        *result["notes"],
    ) + "".join(
        f"\n{name}:\n{_protocol({'protocol': protocol})}"
        for name, protocol in _by_evaluation(result["protocols"]).items()
    )


def _by_evaluation(protocols: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The protocols of rows from elsewhere, one for all rows of the same evaluation."""
    names: dict[str, list[str]] = {}
    for name, protocol in protocols.items():
        names.setdefault(json.dumps(protocol), []).append(name)
    return {", ".join(rows): json.loads(text) for text, rows in names.items()}


def _ablation(result: dict[str, Any]) -> str:
    return _section(
        result,
        "Table 2: shared noise in training and in sampling",
        _sheet(result, "The cells of the ablation"),
        "Held-out puppets: for each clip the true frames, the flow that was given, and what each "
        "cell makes of it. The trainings differ in the named setting alone "
        "([commands](training.md#ablation)). Ratios of FVD are to be compared with those of the "
        "paper, the distances themselves are not: data, size and number of clips are others.",
        ablation.markdown(result),
        *result["notes"],
    )


def _joining(result: dict[str, Any]) -> str:
    return _section(
        result,
        "Ways of joining flow",
        "An image model that stays as it is, and for each fusion an adapter that was trained on it "
        "alone, from one seed on the same clips, frames and noise. What the fusions are, the "
        "[method](method.md#joining-flow-and-prompt) says. Both together have the smallest error "
        "without anchors, `channel` alone hardly a larger one; anchored, all but `spatial` alone "
        "are alike. FVD tells none from another. So `channel`, the paper's, is enough for clips "
        "that are anchored, and `channel+spatial`, with three times the weights, is recommended "
        "for those that are not. The U-Net "
        "of the image model was once trained with an adapter of channel fusion, which was taken "
        "off: if that still helps one of the fusions, then channel.",
        joining.markdown(result),
    )


def _joining_lora(result: dict[str, Any]) -> str:
    return _section(
        result,
        "A LoRA beside the adapter",
        "On from the `channel+spatial` adapter above: the same further steps with the adapter "
        "alone, and with a LoRA on the attention of the U-Net that learns beside it. "
        f"{_plain_error(result, 'adapter alone')} of the motion are left without anchors by the "
        f"one and {_plain_error(result, 'with a LoRA of rank 8')} by the other: nothing that can "
        "be told apart.",
        joining_lora.markdown(result),
    )


def _plain_error(result: dict[str, Any], name: str) -> str:
    return f"{result['table'][f'{name}, plain']['flow_error']:.3f}"


def _adapter_quick(result: dict[str, Any]) -> str:
    return _section(
        result,
        "A short training of an adapter on a CPU",
        "The trainer of *Train Flow Adapter* on 30 prepared clips and the frozen U-Net of the "
        f"bundled checkpoint: after {result['steps']} steps the flow error on held-out clips is "
        f"{result['trained']:.2f}, untrained {result['untrained']:.2f} (wanted: a third less, "
        f"{_met(result['share'] <= adapter_quick.TARGET)}). Other work shared the processors.",
    )


def _pose(result: dict[str, Any]) -> str:
    return _section(
        result,
        "Pose in place of flow",
        _sheet(result, "Given flow and given pose"),
        "The same held-out puppets by the plain method, given their flow, and given the flow that "
        "their keypoints alone say ([why so](decisions.md#the-model-and-its-data)). *Trained on*: "
        "100 steps of `s2dm train stage2 --config s2dm/training/configs/puppets_pose.toml`, on one "
        "core of an AMD EPYC. FVD of so few clips is to be read in ratios alone.",
        pose.markdown(result),
        *result["notes"],
    )


def _noise_in_training(result: dict[str, Any]) -> str:
    return _section(
        result,
        "What shared noise changes in training",
        "Both trainings of Table 2 on the same batches with either noise. A checkpoint's loss is "
        "the same with both, as it must be: frames never see one another, and each one's noise is "
        "normal in either case. The gradient scatters more where frames share their noise, so as "
        "many steps teach less: it fits that (I) stays behind (IV), and (II) behind (III).",
        noise_in_training.markdown(result["table"]),
    )


def _flow_estimators(result: dict[str, Any]) -> str:
    return _section(
        result,
        "How well flow is estimated",
        "Beside the exact flow of held-out puppets. *hidden found*: the mean occlusion where frame "
        "1 hides the pixel; *seen hidden*: where frame 1 shows it. A "
        "[region-motion model](training.md#region-motion) learns from frames alone; *true "
        "keypoints* is what the skeleton says, without a picture.",
        flow_estimators.markdown(result["table"]),
    )


SECTIONS = {
    "flow_following": _flow_following,
    "limits": _limits,
    "ablation": _ablation,
    "joining": _joining,
    "joining_lora": _joining_lora,
    "adapter_quick": _adapter_quick,
    "noise_in_training": _noise_in_training,
    "table1": _table1,
    "pose": _pose,
    "flow_generation": _flow_generation,
    "two_stage": _two_stage,
    "flow_estimators": _flow_estimators,
    "drawn_motion": _drawn_motion,
    "drawing": _drawing,
    "speed": _speed,
    "import_time": _import_time,
}


def _met(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


if __name__ == "__main__":
    main()
