"""Everything that knows Accelerate, data sets and files: the main job and its parts."""

from gac_plugin.training.checkpoint import Checkpoints, newest_intact, read_checkpoint
from gac_plugin.training.config import PRESETS, Config
from gac_plugin.training.hub import from_pretrained, load_discriminator, load_generator
from gac_plugin.training.loop import train
from gac_plugin.training.publish import push_to_hub

__all__ = [
    "PRESETS",
    "Checkpoints",
    "Config",
    "from_pretrained",
    "load_discriminator",
    "load_generator",
    "newest_intact",
    "push_to_hub",
    "read_checkpoint",
    "train",
]
