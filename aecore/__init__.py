"""The mathematics of stacked autoencoders: data, networks, variants, one training loop, measures, pictures.

Nothing here knows of Ray or MLflow; a stage is a plain function of (spec, inputs).
"""

import os

# Arrow's own pool keeps some 100 MB of freed memory per process; read when pyarrow is imported, inherited by workers
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
