"""The variants of the autoencoder, each a frozen model whose fields are its hyperparameters and whose `loss` is its
mathematics.

To add a variant, write its file and name it in the union `Variant`. The command line, the hashes, studies and the
tables of tests follow from that.
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
