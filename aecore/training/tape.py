"""Steps as tapes: recorded once, replayed without modules, autograd and Python.

A step calls the same operations on tensors of the same shapes at every batch. On a CPU, finding out which takes a third
to half of the time of a small layer's step. The replay is a graph that TorchScript's interpreter runs as it stands.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

Step = Callable[..., None]
_LARGE = 2**19
"""Numbers of a tensor that is updated as soon as its gradient is there, while a cache holds both. All gradients of such
a size, let go at the end of a step, would go back to the system, to come anew, cleared, in the next."""
_UPDATE, _ADD = torch.ops.aten._fused_adamw_.tensor_lr, torch.ops.aten.add_.Tensor
_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Taped:
    """A step that trains in place on tensors of always the same shapes, recorded at its second call and from the fourth
    on replayed, to the same bits: at the third both are done and compared.

    What it reads besides must lie at the same place at every step and is read anew at each: weights, the optimiser's
    state, a learning rate. Random numbers are drawn anew, too. Where memory runs out amid a replay, large tensors
    may have their update already.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.calls = 0
        self.tape: _Recorder | None = None
        self.replay: Step | None = None

    def __call__(self, *inputs: Tensor) -> None:
        if self.replay is not None:
            return self.replay(*inputs)
        self.calls += 1  # the first brings into being what is kept from step to step
        if self.calls == 2:
            with _Recorder(inputs) as self.tape:
                return self.step(*inputs)
        if self.tape is not None and not self.tape.branches:
            tape, self.tape = self.tape, None
            return self._compare(tape, inputs)
        self.step(*inputs)

    def _compare(self, tape: "_Recorder", inputs: Sequence[Tensor]) -> None:
        places = _places([*tape.constants, *inputs])
        random, other, reason = torch.get_rng_state(), list[Tensor](), "gives other numbers"
        try:
            replay = tape.compiled()
            other = [place.clone() for place in places]  # as it was
        except Exception as error:  # whatever it is, the step itself may do
            reason = _reason(error)
        self.step(*inputs)
        if other:
            _exchange(places, other)  # as the step left it
            made = torch.get_rng_state()
            torch.set_rng_state(random)
            try:
                replay(*inputs)
                if torch.equal(torch.get_rng_state(), made) and all(map(torch.equal, places, other)):
                    self.replay = replay
                    return
            except Exception as error:
                reason = _reason(error)
            _exchange(places, other)
            torch.set_rng_state(made)
        warnings.warn(f"a recorded step {reason}: trained without it", stacklevel=2)


def _reason(error: Exception) -> str:
    return f"fails ({' '.join(str(error).split())[:160]})"


def _places(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The memory that tensors lie in, each part once, as bytes."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in found.values()]


def _exchange(places: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """What lies in the one and in the other, without memory for it, the lack of which would leave a mixture."""
    for place, other in zip(places, others, strict=True):
        place ^= other
        other ^= place
        place ^= other


def _parts(params: Sequence[Tensor], *others: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], ...]]:
    """The arguments of an update of all tensors as those of several: of each that is large, and of all others."""
    large = [[n] for n, tensor in enumerate(params) if tensor.numel() >= _LARGE]
    small = [n for n, tensor in enumerate(params) if tensor.numel() < _LARGE]
    for chosen in [*large, *([small] if small else [])]:
        yield tuple([tensors[n] for n in chosen] if tensors else [] for tensors in (params, *others))


class _Name(str):
    """Of a tensor, where an operation's other arguments are as they were."""


class _Call(NamedTuple):
    func: Any
    given: list[Any]
    """Its arguments, as its schema lists them."""
    made: list[str]
    read: list[str]
    needed: bool
    """Even where nothing reads what it makes: it changes something or draws random numbers."""
    reads: set[str]
    """What it reads and what that is a view of."""
    changes: set[str]
    """What of this it may change."""
    early: bool
    """It may come as soon as those before, on which it depends, are done."""

    def waits_for(self, other: "_Call") -> bool:
        return bool(self.reads & {*other.made, *other.changes} or self.changes & other.reads)


def _ordered(calls: Iterable[_Call]) -> list[_Call]:
    """As they came, but the early ones as early as they may."""
    ordered: list[_Call] = []
    for call in calls:
        place = len(ordered)
        while call.early and place and not call.waits_for(ordered[place - 1]):
            place -= 1
        ordered.insert(place, call)
    return ordered


class _Recorder(TorchDispatchMode):
    """The operations below autograd that run meanwhile, in order.

    Variables are `x0` and so on for inputs, `v` for what is made on the way, `c` for all that was there before. Tensors
    are known by weak references: autograd clones a gradient that somebody else holds.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.constants: list[Tensor] = []
        """That were there before; views of them, made on the way, not included."""
        self.branches = False
        """A number or a shape was read from values: what follows may depend on it."""
        self.inputs = [f"x{number}" for number in range(len(inputs))]
        self.names = WeakTensorKeyDictionary()
        for name, tensor in zip(self.inputs, inputs, strict=True):
            self.names[tensor] = name
        self.views: dict[str, str] = {}
        """What each view is one of."""
        self.numbers = count()
        self.values: dict[str, Tensor] = {}
        """Of what there was before."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or it imports the compiler, which takes two seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default:
            self.names[out] = self._named(args[0], [])
        elif func is _UPDATE:
            for part in _parts(*args):
                self._call(func, part, kwargs, out, changes=[*part[0], *part[2], *part[3]])
        else:
            self._call(func, args, kwargs or {}, out)
        return out

    def _call(self, func: Any, args: Any, kwargs: Any, out: Any, changes: Sequence[Tensor] = ()) -> None:
        several = isinstance(out, tuple | list)
        outs = out if several else [out]
        read: list[str] = []
        others = func._schema.arguments[len(args) :]
        given = [*args, *(kwargs.get(other.name, other.default_value) for other in others)]
        given = [self._named(arg, read) for arg in given]
        tensors = [one for one in outs if isinstance(one, Tensor)]
        if func.is_view and not any(name[0] in "vx" for name in read):
            for tensor in tensors:
                self.views[self._constant(tensor)] = self.views.get(read[0], read[0])
            return
        mutable = func._schema.is_mutable
        self.branches |= (not tensors and not mutable) or not _DEPENDENT.isdisjoint(func.tags)
        fresh = [isinstance(one, Tensor) and one not in self.names for one in outs]  # not what was written to
        made = [self._variable(one) if new else "_" for one, new in zip(outs, fresh, strict=True)]
        if func.is_view:
            self.views |= dict.fromkeys(made, self.views.get(read[0], read[0]))
        reads = {self.views.get(name, name) for name in read} | set(read)
        changed = {self.names[tensor] for tensor in changes} or (reads if mutable else set())
        needed = mutable or torch.Tag.nondeterministic_seeded in func.tags
        early = func is _UPDATE or (func is _ADD and all(name[0] == "c" for name in read))
        self.calls.append(_Call(func, given, made, read, needed, reads, changed, early))

    def _variable(self, tensor: Tensor) -> str:
        self.names[tensor] = name = f"v{next(self.numbers)}"
        return name

    def _constant(self, tensor: Tensor) -> str:
        self.names[tensor] = name = f"c{len(self.values)}"
        self.values[name] = tensor
        return name

    def _named(self, arg: Any, read: list[str]) -> Any:
        if isinstance(arg, tuple | list):
            return [self._named(one, read) for one in arg]
        if not isinstance(arg, Tensor):
            return arg
        if arg not in self.names:
            self.constants.append(arg)
            self._constant(arg)
        read.append(self.names[arg])
        return _Name(read[-1])

    def compiled(self) -> Step:
        """What repeats it all, on the inputs that it is given; a variable is let go after its last use."""
        graph = _Graph(self.inputs, self.values)
        calls: list[_Call] = []
        live: set[str] = set()
        for call in reversed(_ordered(self.calls)):
            if call.needed or not live.isdisjoint(call.made):
                calls.append(call)
                live.update(call.read)
        for call in reversed(calls):
            graph.add(call)
        return graph.function()


class _Graph:
    """Calls, in order, as TorchScript's interpreter takes them."""

    def __init__(self, inputs: Sequence[str], constants: Mapping[str, Tensor]) -> None:
        self.graph: Any = torch._C.Graph()
        self.known = {name: self.graph.addInput() for name in inputs}
        self.constants = constants
        self.given: list[Any] = []
        """What it takes beside the inputs."""

    def add(self, call: _Call) -> None:
        schema = call.func._schema
        given = [self._value(arg, formal.type) for arg, formal in zip(call.given, schema.arguments, strict=True)]
        made = self._node(schema.name, given, len(schema.returns))
        if made and isinstance(schema.returns[0].type, torch.ListType):
            made[0].setType(schema.returns[0].type)
            made = self._node("prim::ListUnpack", made, len(call.made))
        self.known.update(zip(call.made, made, strict=False))

    def _node(self, kind: str, given: Sequence[Any], count: int) -> list[Any]:
        node = self.graph.create(kind, given, count)
        self.graph.appendNode(node)
        return list(node.outputs())

    def _input(self, value: Any, kind: Any) -> Any:
        self.given.append(value)
        added = self.graph.addInput()
        added.setType(kind)
        return added

    def _value(self, arg: Any, kind: Any) -> Any:
        while isinstance(kind, torch.OptionalType):
            kind = kind.getElementType()
        if isinstance(arg, _Name):
            if arg not in self.known:
                self.known[arg] = self._input(self.constants[arg], kind)
            return self.known[arg]
        if isinstance(arg, torch.memory_format):
            return self._input(arg, kind)  # of which it makes no constant
        if not isinstance(arg, list):
            return self.graph.insertConstant(arg)
        (made,) = self._node("prim::ListConstruct", [self._value(one, kind.getElementType()) for one in arg], 1)
        made.setType(kind)
        return made

    def function(self) -> Step:
        self.graph.registerOutput(self.graph.insertConstant(None))
        run, given = torch._C._create_function_from_graph("replay", self.graph), self.given

        @torch.inference_mode()
        def replay(*inputs: Tensor) -> None:
            # else writes to lists are left out
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # not re-exported by name
                run(*inputs, *given)

        return replay
