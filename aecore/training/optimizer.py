"""The optimiser, AdamW, and its state in checkpoints."""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from aecore.training.team import Team

_NEGLIGIBLE = 1e-30
"""First moments at or below this size are set to zero."""


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


class AdamW:
    """AdamW (Loshchilov & Hutter 2019), which without weight decay is Adam (Kingma & Ba 2015), in one fused kernel.

    It calls torch's functional `adamw`, as the class `torch.optim.AdamW(fused=True)` does. Constructing that class
    imports torch's compiler: 1.2 s of each new process (torch 2.15, EPYC, files in cache), as long as training a layer.
    """

    def __init__(self, parameters: Iterable[Tensor], weight_decay: float) -> None:
        self.parameters = list(parameters)
        self.weight_decay = weight_decay
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        # one count per parameter, which torch raises by one at each step
        self.steps = torch.zeros(len(self.parameters), device=self.parameters[0].device)
        self.counts = list(self.steps.unbind())

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def flush(self) -> None:
        """Set negligible moments to zero before they become denormal numbers.

        Without gradients, as in a unit that died, a first moment shrinks to a denormal number in some 600 steps; a CPU
        takes several times as long for such numbers. The moments that are set to zero are too small to move a weight.
        In 100 steps a moment falls to 3e-5 of itself, so a call every 100 steps is early enough.
        """
        for moment in (*self.means, *self.squares):
            moment.copy_(F.hardshrink(moment, _NEGLIGIBLE))

    def sum_gradients(self, team: Team) -> None:
        """Add up the gradients of the team's parts of a batch; a worker whose part is empty adds zeros."""
        if team.size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
        team.sum(gradients)

    @torch.no_grad()
    def step(self, rate: float | Tensor) -> None:
        """Update the parameters by their gradients at a learning rate."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.parameters), "every trained parameter takes part in the loss"
        adamw(
            self.parameters, gradients, self.means, self.squares, [], self.counts, fused=True, lr=rate, beta1=0.9,
            beta2=0.999, weight_decay=self.weight_decay, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number of steps and both moments of each parameter, by name; the moments are not copies."""
        moments = {"mean": self.means, "square": self.squares}
        return {"steps": self.steps[0]} | {
            f"{name}.{number}": moment for name, each in moments.items() for number, moment in enumerate(each)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the state that `state_dict` returned."""
        self.steps.copy_(state["steps"].expand_as(self.steps))
        for number, (mean, square) in enumerate(zip(self.means, self.squares, strict=True)):
            mean.copy_(state[f"mean.{number}"])
            square.copy_(state[f"square.{number}"])
