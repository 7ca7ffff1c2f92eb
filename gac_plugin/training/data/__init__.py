"""Data sets: from the Hub or a folder, through columns and codecs, to batches on the device."""

from gac_plugin.training.data.load import Data, codec_of, load_data

__all__ = ["Data", "codec_of", "load_data"]
