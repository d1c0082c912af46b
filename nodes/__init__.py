"""The nodes, one family a file."""

from comfy_api.latest import ComfyExtension, io

from .anchor import AnchorToReference
from .clip import FitClip
from .conditioning import EncodeFlow
from .example import place_examples
from .flow import EstimateFlow, GenerateFlow, VisualizeFlow
from .flow_files import LoadFlow, SaveFlow
from .flow_tools import CombineFlow, EditFlow, PickFlow, WarpImage
from .loaders import (
    ApplyFlowAdapter,
    CheckpointLoader,
    FlowGeneratorLoader,
    RegionMotionLoader,
)
from .motion import CameraFlow, DrawFlow, FlowToTracks, TracksToFlow
from .native.files import register_folder
from .pose import PoseToFlow
from .sampling import SharedNoise, SharedNoiseKSampler, SharedNoiseSampler
from .training import PrepareClips, TrainFlowAdapter
from .training_flow import TrainFlowGenerator

NODES: list[type[io.ComfyNode]] = [
    CheckpointLoader,
    ApplyFlowAdapter,
    RegionMotionLoader,
    FlowGeneratorLoader,
    FitClip,
    EstimateFlow,
    GenerateFlow,
    EncodeFlow,
    AnchorToReference,
    SharedNoiseKSampler,
    SharedNoise,
    SharedNoiseSampler,
    VisualizeFlow,
    DrawFlow,
    CameraFlow,
    TracksToFlow,
    FlowToTracks,
    PoseToFlow,
    EditFlow,
    CombineFlow,
    PickFlow,
    WarpImage,
    SaveFlow,
    LoadFlow,
    PrepareClips,
    TrainFlowAdapter,
    TrainFlowGenerator,
]


class S2DMExtension(ComfyExtension):
    """What ComfyUI asks the pack for."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folder()
        place_examples()
        return NODES
