"""Adversarial autoencoders and VAE-GANs: GAC around an encoder and a decoder that stay yours.

| | GAC's generator | real samples | source |
|---|---|---|---|
| `AdversarialAutoencoder` | the encoder, x -> code | draws of the prior | Makhzani et al. 2015 |
| `VAEGAN` | the decoder, code -> x | x | Larsen et al. 2016 |

A step is two: the autoencoder's own, down the reconstruction error, and `gac.step`. Whatever GAC was built with (loss,
score, penalty, schedule, optimizers) holds here too; its `max_norm` and `skip_nonfinite` concern its own half alone.
Neither class has a state of its own: save your networks, your optimizers and `gac.state_dict()`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gac_plugin.cotangent import evaluating, frozen
from gac_plugin.errors import UsageError
from gac_plugin.protocols import LatentSource, latent_sampler
from gac_plugin.strategy import GAC, Stats
from gac_plugin.update import Update

Error = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, x), equal shapes (B, ...) -> a 0-dimensional tensor to minimise."""


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(m, diag exp v) || N(0, I)) = 1/2 sum (m^2 + exp v - 1 - v), for each sample, in nats.

    Args:
        mean, log_variance: shape (B, ...).

    Returns:
        Shape (B,).
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def half_squared_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    """E_x 1/2 ||reconstruction - x||^2: minus the log likelihood of N(reconstruction, I), but for a constant."""
    return 0.5 * (reconstruction - x).square().flatten(1).sum(1).mean()


def error_in(features: Callable[[Tensor], Tensor]) -> Error:
    """`half_squared_error` of features, in place of samples: what Larsen et al. 2016 call learned similarity.

    Args:
        features: samples (B, ...) -> features (B, ...); a layer of D is the paper's, for example `D[:4]` of an
            `nn.Sequential`. `VAEGAN` holds D's parameters; those of another network freeze yourself.
    """

    def error(reconstruction: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = features(x)
        return half_squared_error(features(reconstruction), target)

    return error


class _Autoencoder:
    """What both have in common: two networks, the optimizer of the reconstruction step, and the prior of the codes."""

    def __init__(
        self,
        gac: GAC,
        encoder: nn.Module,
        decoder: nn.Module,
        optimizer: torch.optim.Optimizer,
        prior: LatentSource | None,
        error: Error,
    ) -> None:
        draw = latent_sampler(prior, decoder)
        if draw is None:
            raise UsageError("the shape of a code is not known; pass its size, or give the decoder an attribute nz")
        if optimizer is gac.generator_optimizer:
            raise UsageError(
                "one optimizer serves both the reconstruction and GAC's generator, which mixes their moments; make two"
            )
        self.gac = gac
        self.encoder = encoder
        self.decoder = decoder
        self.optimizer = optimizer
        self.error = error
        self._draw = draw
        self._update = Update(optimizer, gac.accelerator)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Samples (B, ...) -> their reconstructions, of the same shape, networks in evaluation mode, no graph."""
        with torch.no_grad(), evaluating(self.encoder, self.decoder):
            return self.decoder(self._code(x))

    def sample(self, n: int) -> Tensor:
        """Decode `n` draws of the prior: shape (n, ...), decoder in evaluation mode, no graph."""
        like = next(self.decoder.parameters()).new_empty(n)
        with torch.no_grad(), evaluating(self.decoder):
            return self.decoder(self._draw(like))

    def _code(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def _draws(self, x: Tensor) -> Tensor:
        """One draw of the prior for each sample."""
        if not x.is_floating_point():
            raise UsageError(f"samples must be floating point, got {x.dtype}; convert them to the decoder's range")
        return self._draw(x)

    def _descend(self, loss: Tensor) -> None:
        """The autoencoder's own step."""
        self._update.begin()
        if self.gac.accelerator is None:
            loss.backward()
        else:
            self.gac.accelerator.backward(loss)
        self._update.finish()


class AdversarialAutoencoder(_Autoencoder):
    """An autoencoder whose codes follow a prior, because a discriminator of codes cannot tell them from its draws.

        reconstruction    down error(decoder(encoder(x)), x), both networks
        regularisation    gac.step(real=draws of the prior, z=x): D of codes, then the encoder as generator of codes

    Source: Makhzani et al. 2015, section 2. The posterior is what the encoder makes of it: deterministic, unless your
    encoder draws noise. The paper trains by SGD with momentum; any optimizers serve here.

    Args:
        gac: built around the encoder and a discriminator of codes.
        decoder: codes -> samples.
        optimizer: of the reconstruction, over the encoder's and the decoder's parameters; another one than GAC's.
        prior: size or shape of a code, for standard normal codes, or batch size -> draws; None asks the decoder's `nz`.
        error: of the reconstruction; the mean squared error unless given.

    Raises:
        UsageError: no prior, or one optimizer for both steps.
    """

    def __init__(
        self,
        gac: GAC,
        decoder: nn.Module,
        optimizer: torch.optim.Optimizer,
        prior: LatentSource | None = None,
        error: Error = mse_loss,
    ) -> None:
        super().__init__(gac, gac.generator, decoder, optimizer, prior, error)

    def step(self, x: Tensor) -> Stats:
        """One step of all three networks.

        Args:
            x: samples, shape (B, ...), floating point, in the range that the decoder makes.

        Returns:
            `reconstruction`, the error, and the statistics of `GAC.step`, where `d_real` is D's mean at the prior's
            draws and `d_fake` at the codes. Detached, 0-dimensional.

        Raises:
            UsageError: codes and the prior's draws, or reconstructions and samples, differ in shape; or see `GAC.step`.
        """
        draws = self._draws(x)
        codes = self.encoder(x)
        _require_fit(codes, draws)
        reconstruction = self.decoder(codes)
        _require_reconstruction(reconstruction, x)
        error = self.error(reconstruction, x)
        self._descend(error)
        return {"reconstruction": error.detach()} | self.gac.step(draws, x)


class VAEGAN(_Autoencoder):
    """A variational autoencoder whose decoder is a GAN's generator as well.

        variational    down error(decoder(z), x) + kl_weight KL(q(z|x) || N(0, I)), z ~ q(z|x), both networks, D held
        adversarial    gac.step(x, codes): D, then the decoder, at as many reconstructions as decoded draws of the prior

    Source: Larsen et al. 2016, algorithm 1. As there, D's covectors at the reconstructions end in the decoder and do
    not reach the encoder, and the reconstruction error, also in D's features, does not reach D. It differs in these:

    - The decoder takes two steps, one of each line, where the paper takes one down gamma * error - score. With plain
      gradient steps gamma is the ratio of the two learning rates.
    - A batch of B shows D B/2 reconstructions and B/2 decoded draws, not B of each: D 2B passes instead of 3B, and
      both kinds together weigh as much as the real samples.
    - The decoder ascends GAC's score, log D unless you choose another; the paper's log(1 - D) is loss="minimax".

    Args:
        gac: built around the decoder and a discriminator of samples.
        encoder: samples -> (mean, log variance) of q(z|x), a tuple of two tensors of a code's shape (B, ...).
        optimizer: of the variational step, over the encoder's and the decoder's parameters; another one than GAC's.
        latent: size or shape of a code; None asks the decoder's `nz`.
        error: of the reconstruction; unless given, that of a normal likelihood of variance 1, `half_squared_error`.
            `error_in(features)` measures it in a layer of D, as the paper does.
        kl_weight: 1 is the evidence bound; below 1 it stands for a narrower likelihood.

    Raises:
        UsageError: no size of a code, or one optimizer for both steps.
    """

    def __init__(
        self,
        gac: GAC,
        encoder: nn.Module,
        optimizer: torch.optim.Optimizer,
        latent: int | tuple[int, ...] | None = None,
        error: Error = half_squared_error,
        kl_weight: float = 1.0,
    ) -> None:
        super().__init__(gac, encoder, gac.generator, optimizer, latent, error)
        self.kl_weight = kl_weight

    def step(self, x: Tensor) -> Stats:
        """One step of all three networks.

        Args:
            x: samples, shape (B, ...), floating point, in the range that the decoder makes.

        Returns:
            `reconstruction`, the error, `kl`, in nats for each sample, and the statistics of `GAC.step`. Detached,
            0-dimensional.

        Raises:
            UsageError: the encoder does not return a mean and a log variance of a code's shape; reconstructions and
                samples differ in shape; or see `GAC.step`.
        """
        draws = self._draws(x)
        mean, log_variance = _pair(self.encoder(x))
        for part in (mean, log_variance):
            _require_fit(part, draws)
        codes = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        reconstruction = self.decoder(codes)
        _require_reconstruction(reconstruction, x)
        with frozen(self.gac.discriminator):
            error = self.error(reconstruction, x)
        kl = kl_to_standard_normal(mean, log_variance).mean()
        self._descend(error + self.kl_weight * kl)

        half = len(x) // 2
        judged = torch.cat([codes.detach()[:half], draws[half:]])
        return {"reconstruction": error.detach(), "kl": kl.detach()} | self.gac.step(x, judged)

    def _code(self, x: Tensor) -> Tensor:
        return _pair(self.encoder(x))[0]


def _pair(answer: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(answer, tuple) and len(answer) == 2):
        raise UsageError(
            f"the encoder returned a {type(answer).__name__}; VAEGAN needs a tuple (mean, log_variance), for example "
            "encoder(x).chunk(2, dim=1)"
        )
    return answer


def _require_fit(codes: Any, draws: Tensor) -> None:
    if not isinstance(codes, Tensor):
        raise UsageError(f"the encoder returned a {type(codes).__name__} where a tensor of codes is wanted")
    if codes.shape != draws.shape:
        raise UsageError(
            f"codes and the prior's draws differ in shape: {tuple(codes.shape)} and {tuple(draws.shape)}; "
            "change the encoder's last layer or the size of a code"
        )


def _require_reconstruction(reconstruction: Tensor, x: Tensor) -> None:
    if reconstruction.shape != x.shape:
        raise UsageError(
            f"reconstructions and samples differ in shape: {tuple(reconstruction.shape)} and {tuple(x.shape)}; "
            "change the decoder's last layer, or reshape the samples"
        )
