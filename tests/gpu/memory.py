"""Memory of a process that computes one stage after another, as the worker of a GPU does: none may be left behind."""

import gc
from typing import Any

import torch

from aecore.config.experiment import Fit
from aecore.stages.pretrain import prepare
from aecore.stages.training import train, train_as_one
from aecore.training.memory import free_device_memory
from tests.benchmarks.tables import show
from tests.gpu.report import Report
from tests.gpu.scale import Scale
from tests.gpu.speed import layers, pretraining, random_rows

ROWS, HELD, FIRST = 320, 64, 2
"""After stage 2 both kinds of stages have run: one fit, and two as one."""
SLACK = {"allocated": 2**20, "reserved": 2**21}
"""Bytes by which memory may grow over all stages; a stage's weights alone are more. torch reserves blocks of 2 MB."""


def check(scale: Scale, report: Report) -> list[dict[str, Any]]:
    """Run stages one after another, each released as the worker of a GPU does; print a table of the memory in between
    and return its rows."""
    data, layer = random_rows(ROWS, HELD), layers((256,))[0]
    if scale.device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
    shown = sorted({FIRST, scale.stages, *(round(scale.stages * share) for share in (0.1, 0.4, 0.7))} - {0, 1})
    rows: list[dict[str, Any]] = []
    for number in range(1, scale.stages + 1):
        specs = [pretraining(layer, seed=seed) for seed in range(number, number + 2)]
        # every tenth stage has a fit that diverges, whose error must hold no memory
        fits = Fit(epochs=2), Fit(epochs=2, lr=1e30 if number % 10 == 0 else 1e-3)
        specs = [spec.model_copy(update={"fit": fit}) for spec, fit in zip(specs, fits, strict=True)]
        if number % 2:
            train(prepare(specs[0], scale.context, data=data))
        else:
            train_as_one((prepare(spec, scale.context, data=data) for spec in specs), scale.everywhere)
        free_device_memory()
        if number in shown:
            rows.append({"after stage": number, **held(scale)})
    show(f"Bytes of memory while {scale.stages} stages run one after another", rows)
    for name, slack in SLACK.items():
        if rows[-1][name] > rows[0][name] + slack:
            series = ", ".join(f"{row[name] / 1e6:,.1f} after stage {row['after stage']}" for row in rows)
            report.fail(f"memory grows: MB {name} are {series}")
    return rows


def held(scale: Scale) -> dict[str, int]:
    """Return the bytes that are allocated and reserved now, and the most so far; on a CPU those of all tensors."""
    if scale.device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(),
            "most allocated": torch.cuda.max_memory_allocated(), "most reserved": torch.cuda.max_memory_reserved(),
        }  # fmt: skip
    plain = (torch.Tensor, torch.nn.Parameter)  # and none of the symbolic ones that torch's compiler makes
    living = sum(one.nbytes for one in gc.get_objects() if type(one) in plain)
    return {"allocated": living, "reserved": living}
