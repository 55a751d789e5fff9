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

__all__ = ["Contractive", "Denoising", "Plain", "Sparse", "Variant", "Variational"]
