"""Everything that knows Accelerate, data sets and files: the main job and its parts."""

from gac_plugin.training.config import PRESETS, Config
from gac_plugin.training.hub import load_discriminator, load_generator
from gac_plugin.training.loop import train

__all__ = ["PRESETS", "Config", "load_discriminator", "load_generator", "train"]
