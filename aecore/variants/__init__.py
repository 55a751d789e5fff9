"""The variants of the autoencoder, each with its hyperparameters as fields and its mathematics as `loss`.

To add a variant, write its file and name it in the union `Variant`; command line, hashes, studies and tests follow.
"""

from typing import Annotated

from pydantic import Field

from aecore.variants.contractive import Contractive
from aecore.variants.denoising import Denoising
from aecore.variants.plain import Plain
from aecore.variants.sparse import Sparse
from aecore.variants.variational import Variational

Variant = Annotated[Plain | Sparse | Denoising | Contractive | Variational, Field(discriminator="kind")]

__all__ = ["Contractive", "Denoising", "Plain", "Sparse", "Variant", "Variational"]
