"""The variational autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat

from aecore.core.errors import InputError
from aecore.models.divergences import kl_to_prior
from aecore.variants.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.core.types import Activation, Terms
    from aecore.models.autoencoder import Autoencoder
    from aecore.models.spec import LayerSpec


class Variational(Objective):
    """The variational autoencoder of Kingma & Welling (2014) maximises the evidence lower bound of the data.

    The bound is E_q[log p(x|z)] - beta * KL(q(z|x) || N(0, 1)) (eq. 10; beta by Higgins et al. 2017), summed over
    features and codes and averaged over the batch. Codes are drawn by reparameterisation. It assumes that the posterior
    q(z|x) is Gaussian with independent codes; the code that the layer emits is its mean. p(x|z) is `data.likelihood`:
    squared error is a Gaussian of variance 1/2 without its constant. On grey values cross-entropy is not a likelihood,
    but continuous_bernoulli is (Loaiza-Ganem & Cunningham 2019).
    """

    paper: ClassVar = "Kingma & Welling, ICLR 2014; Higgins et al., ICLR 2017"
    kind: Literal["variational"] = "variational"
    beta: NonNegativeFloat = 1.0
    """Weight of variational's divergence from the prior; 1 gives the evidence lower bound itself."""
    binarize: bool = False
    """Whether variational draws each pixel as 0 or 1, with its grey value as the probability of 1, anew for every batch
    (only for the bernoulli likelihood)."""

    @property
    def code_activation(self) -> Activation | None:
        return "linear"  # codes of the prior have no bounds

    def build(self, layer: LayerSpec, number: int) -> LayerSpec:
        if self.binarize and number == 1 and layer.likelihood != "bernoulli":
            raise InputError(
                f"variant.binarize: needs the bernoulli likelihood, but the data have {layer.likelihood}; "
                "set --data.likelihood bernoulli or --variant.binarize false"
            )
        return layer.model_copy(update={"stochastic": True})

    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        import torch

        if self.binarize and model.input_spec.likelihood == "bernoulli":
            drawn = (torch.rand_like(x) < x).to(x.dtype)  # takes a quarter of torch.bernoulli's time on CPU
            x = torch.where(x.isnan(), x, drawn) if model.input_spec.missing else drawn
        mean, log_variance = (parameter.float() for parameter in model.posterior(x))
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return {
            "reconstruction": model.reconstruction_loss(code, x),
            "kl": self.beta * kl_to_prior(mean, log_variance).mean(),
        }
