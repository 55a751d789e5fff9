"""The variants: each a frozen model whose fields are its hyperparameters and whose `loss` is its mathematics.

To add one, write its file and name it in `Variant`; the command line, hashes, studies and test tables follow.
"""

from typing import Annotated

from pydantic import Field

from aecore.variants.contractive import Contractive
from aecore.variants.denoising import Denoising
from aecore.variants.plain import Plain
from aecore.variants.sparse import Sparse
from aecore.variants.variational import Variational

Variant = Annotated[Plain | Sparse | Denoising | Contractive | Variational, Field(discriminator="kind")]

__all__ = ["PAPERS", "Contractive", "Denoising", "Plain", "Sparse", "Variant", "Variational"]

PAPERS = {
    "plain": "Hinton & Salakhutdinov, Science 313 (2006); Bengio et al., NIPS 2006",
    "sparse": "Ng, CS294A (2011); Makhzani & Frey, ICLR 2014",
    "denoising": "Vincent et al., JMLR 11 (2010) 3371-3408",
    "contractive": "Rifai et al., ICML 2011",
    "variational": "Kingma & Welling, ICLR 2014; Higgins et al., ICLR 2017",
}
"""Where each variant comes from."""
