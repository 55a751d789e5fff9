"""The variants: each a frozen model whose fields are its hyperparameters and whose `loss` is its mathematics.

To add one, write its file and name it in `Variant`; the command line, the hashes and the test tables follow.
"""

from typing import Annotated

from pydantic import Field

from aecore.variants.denoising import Denoising
from aecore.variants.plain import Plain

Variant = Annotated[Plain | Denoising, Field(discriminator="kind")]

__all__ = ["PAPERS", "Denoising", "Plain", "Variant"]

PAPERS = {
    "plain": "Hinton & Salakhutdinov, Science 313 (2006); Bengio et al., NIPS 2006",
    "denoising": "Vincent et al., JMLR 11 (2010) 3371-3408",
}
"""Where each variant comes from."""
