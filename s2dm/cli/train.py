"""`s2dm train`: one trainer a network."""

from __future__ import annotations

import argparse

from ..settings import add_arguments, from_arguments


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train a network, or go on with a training run",
        description="Train one network. A run whose folder exists goes on where it stopped.",
    )
    networks = parser.add_subparsers(dest="network", required=True, metavar="NETWORK")
    for name, text in (
        ("vae", "the autoencoder"),
        ("text", "the text encoder of a new model"),
        ("stage1", "the flow generator"),
        ("stage2", "the U-Net with its flow adapter and text encoder"),
        ("adapter", "a flow adapter alone, for an image model that stays as it is"),
        ("region-motion", "the region-motion model, which measures flow"),
    ):
        network = networks.add_parser(name, help=text, description=f"Train {text}.")
        add_arguments(network)
        network.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.network == "vae":
        from ..training.vae import VAETrainingConfig, train_vae

        train_vae(from_arguments(VAETrainingConfig, options))
    elif options.network == "text":
        from ..training.text import TextTrainingConfig, train_text

        train_text(from_arguments(TextTrainingConfig, options))
    elif options.network == "stage1":
        from ..training.stage1 import Stage1TrainingConfig, train_stage1

        train_stage1(from_arguments(Stage1TrainingConfig, options))
    elif options.network == "adapter":
        from ..training.adapter_run import AdapterRunConfig, train_adapter

        train_adapter(from_arguments(AdapterRunConfig, options))
    elif options.network == "region-motion":
        from ..training.region_motion import RegionMotionTrainingConfig, train_region_motion

        train_region_motion(from_arguments(RegionMotionTrainingConfig, options))
    else:
        from ..training.stage2 import Stage2TrainingConfig, train_stage2

        train_stage2(from_arguments(Stage2TrainingConfig, options))
