"""What a stage needs of the machine that computes it."""

from aecore.config.needs import training_memory
from aecore.config.specs import FinetuneSpec, LoadSpec, PretrainSpec
from pipelines.graph.stage import Stage


def device_memory(stage: Stage, fits: int = 1) -> int | None:
    """Return the bytes of a GPU's memory that a stage takes by estimate; None if it uses no GPU.

    Only training uses a GPU. References, measures and evaluations are mostly scikit-learn's and would hold the device
    idle, so that they are computed on CPUs while the next stage trains.

    Args:
        fits: Number of stages of this kind that are trained together as one.
    """
    spec = stage.spec
    if not isinstance(spec, PretrainSpec | FinetuneSpec):
        return None
    data = stage.inputs["data"]
    assert isinstance(data, Stage) and isinstance(data.spec, LoadSpec)
    below = stage.inputs.get("below", ())
    assert isinstance(below, tuple)
    frozen = [layer.spec.layer for layer in below if isinstance(layer.spec, PretrainSpec)]
    return training_memory(spec, frozen, data.spec, fits)


def reads_from_disk(stage: Stage) -> bool:
    """Return whether a stage reads data that are too large to be held in memory."""
    specs = [one.spec for one in (stage, *stage.parents())]
    return any(isinstance(spec, LoadSpec) and spec.data.in_memory == "never" for spec in specs)
