"""GAC: gradient ascent along the discriminator's conjugate gradient direction, as a plugin for GAN training."""

from gac_plugin.betas import BETAS, BetaRule, InnerProducts
from gac_plugin.calibrate import calibrate
from gac_plugin.conjugate import ConjugateGradient
from gac_plugin.errors import UsageError
from gac_plugin.losses import LOSSES, SCORES, Loss, Score
from gac_plugin.metric import METRICS, Diagonal, Identity, Metric, Sharp, Spectral, kronecker
from gac_plugin.penalties import PENALTIES, GradientPenalty
from gac_plugin.refine import REFINEMENTS, Refined, Refinement, refine
from gac_plugin.strategy import GAC

__version__ = "0.1.0"

__all__ = [
    "BETAS",
    "GAC",
    "LOSSES",
    "METRICS",
    "PENALTIES",
    "REFINEMENTS",
    "SCORES",
    "BetaRule",
    "ConjugateGradient",
    "Diagonal",
    "GradientPenalty",
    "Identity",
    "InnerProducts",
    "Loss",
    "Metric",
    "Refined",
    "Refinement",
    "Score",
    "Sharp",
    "Spectral",
    "UsageError",
    "calibrate",
    "kronecker",
    "refine",
]
