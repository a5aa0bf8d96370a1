"""A whole model's graph by torch.fx, in which a batch norm takes along the add and activation after it."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import inplace_methods
from torch.fx.proxy import TraceError
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.engine.convert import blocks
from bncli.engine.models.norms import BatchNorm
from bncli.errors import UsageError
from bncli.names import ACTIVATIONS, FUSED_ACTIVATIONS


def in_place(name: str, left: Any, right: Any) -> Any:
    """`left += right` and its kind, by the name in the operator module."""
    return getattr(operator, name)(left, right)


CONTAINERS = (list, dict, set)
ADVICE = "leave trace out: Sequential and known residual blocks are fused without it"
ADDS = {operator.add, torch.add, "add", "add_", in_place}


class _Proxy(fx.Proxy):
    """fx's stand-in for a value. It does not take `y += x` for `y = y + x`, nor itself for no tensor."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What isinstance asks for. The model must not choose its way by it; torch may ask of its own arguments."""
        asked = self.node.op in ("placeholder", "get_attr", "call_module")  # others may be sizes, which operators check
        if asked and not sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.fx.", "torch.nn.")):
            raise TraceError("it asks whether a value is a tensor")
        return _Proxy

    def _in_place(self, other: Any, name: str) -> fx.Proxy:
        proxy = self.tracer.create_proxy("call_function", in_place, (name, self, other), {})
        proxy.node.meta["is_wrapped"] = True  # it stays a call when fx traces the graph again, as unpickling does
        return proxy


for _name in inplace_methods:
    setattr(_Proxy, f"__{_name}__", functools.partialmethod(_Proxy._in_place, name=_name))


class Tracer(fx.Tracer):
    proxy_buffer_attributes = True
    looks_into: tuple[type, ...] = (nn.Identity,)  # also where they hold no norms
    norms: tuple[type, ...] = (_BatchNorm,)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A module that holds no norms stays one call, so that its flags and randomness stay its own."""
        holds_norms = any(isinstance(part, self.norms) for part in m.modules())
        traced = type(m) in self.looks_into or (holds_norms and not isinstance(m, self.norms))
        return not traced or not blocks.is_plain(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *arguments: Any, **options: Any) -> fx.Node:
        autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
        drawn = random.getstate(), torch.get_rng_state().tolist()
        saved = torch._C._autograd._top_saved_tensors_default_hooks(True)  # of torch.utils.checkpoint
        context = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), saved, autocast, drawn
        if vars(self).setdefault("context", context) != context:  # that of the first node, which is an argument
            raise TraceError("it draws random numbers, or computes within no_grad, autocast, checkpoint or the like")
        return super().create_node(*arguments, **options)


def trace(
    model: nn.Module,
    modes: Sequence[bool] = (True, False),
    tracer: type[Tracer] = Tracer,
    *,
    field: str = "trace",
    advice: str = ADVICE,
) -> fx.GraphModule:
    """The graph of a model's forward, which is the same in these modes: True for training, False for evaluation.

    Raises UsageError about `field`, with the reason and the advice, for a forward that fx cannot hold.
    """

    def refusal(reason: str) -> UsageError:
        return UsageError(f"torch.fx cannot hold the forward of this model ({reason}); {advice}", field=field)

    before = {module: (type(module), dict(vars(module))) for module in model.modules()}
    try:
        if not blocks.is_plain(model):
            raise TraceError("the model has hooks or a forward of its own, which the graph would lose")
        for name, argument in inspect.signature(model.forward).parameters.items():
            if argument.default is None or isinstance(argument.default, bool):
                raise TraceError(f"its argument {name} is {argument.default} by default and may choose its way")
        for module, (_, attributes) in before.items():  # what the forward appends to a list is seen, and forgotten
            module.__class__ = blocks.original_class(module)
            held = {name: copy.copy(value) for name, value in attributes.items() if isinstance(value, CONTAINERS)}
            vars(module).update(held)
        graphs = {}
        for training in modes:
            for module in before:
                module.training = training
            graph = tracer().trace(model)
            graphs[graph.python_code("self").src] = graph
        if len(graphs) > 1:
            raise TraceError("it goes another way in training than in evaluation (self.training)")
        for module, (_, attributes) in before.items():
            for name, value in vars(module).items():
                old = attributes.get(name, fx.Proxy)
                if name != "training" and old is not value and not (isinstance(old, CONTAINERS) and old == value):
                    raise TraceError(f"it changes the attribute {name}, or has a tensor that is no parameter or buffer")
    except Exception as error:  # the user's code met stand-ins where it expected tensors: anything may be raised
        raised = "" if isinstance(error, TraceError) else f"it raised {type(error).__name__}: "
        raise refusal(raised + next(iter(str(error).strip().splitlines()), "")) from error
    finally:
        for module, (original, attributes) in before.items():
            module.__class__ = original
            vars(module).clear()
            vars(module).update(attributes)
    for node in graph.nodes:
        node.type = None  # an annotation that is a string could not be pickled
    traced = fx.GraphModule(model, graph, type(model).__name__)
    for kind in ("_modules", "_parameters", "_buffers"):  # also those that are not called, in their order
        setattr(traced, kind, dict(getattr(model, kind)))
    if list(traced.state_dict()) != list(model.state_dict()):
        raise refusal("its state_dict has more than parameters and buffers")
    if list(inspect.signature(traced.forward).parameters) != list(inspect.signature(model.forward).parameters):
        raise refusal("the graph would take its arguments in another order")
    return traced


def fuse(model: fx.GraphModule) -> Iterator[blocks.Site]:
    """Join in place each batch norm of ours to what follows it."""
    for node in list(model.graph.nodes):
        module = _module(node)
        if isinstance(module, BatchNorm):
            yield module, *_fuse(node)
        elif module is not None:  # called as a whole, for it has hooks
            yield from blocks.sites(module, str(node.target))
    model.graph.lint()
    model.recompile()


def _fuse(norm: fx.Node) -> tuple[tuple[str, ...], str | None]:
    """What a norm takes along, now, and why not more."""
    graph, user = norm.graph, _only_user(norm)
    if not blocks.is_open_norm(_module(norm)) or len(norm.args) != 1 or norm.kwargs:
        return (), blocks.CLOSED
    residual, how = _residual(norm, user) if user and user.target in ADDS else (None, None)
    add, user = (user, _only_user(user)) if user and how else (None, user)
    activation = _activation(user)
    reason = None if activation else " and ".join(map(_describe, (add or norm).users)) or blocks.describe(None, "")
    if add is None and activation is None:
        return (), reason
    with graph.inserting_before(norm):
        module = graph.get_attr(str(norm.target))
        follower = graph.get_attr(str(user.target)) if user and activation and _module(user) else activation
        joined = graph.call_function(blocks.run_norm, (module, norm.args[0], follower, residual, how))
    joined.meta["is_wrapped"] = True
    replaced = [node for node in (user if activation else None, add, norm) if node is not None]
    replaced[0].replace_all_uses_with(joined)
    for node in replaced:
        graph.erase_node(node)
    return ("residual add",) * (add is not None) + ((activation,) if activation else ()), reason


def _residual(norm: fx.Node, add: fx.Node) -> tuple[Any, str | None]:
    """What an add right behind a norm adds to its output, and how; None where that is not all that it does."""
    operands = add.args[1:] if add.target is in_place else add.args
    residual: Any = next((operand for operand in operands if operand is not norm), None)
    sign = "+=" if add.target in (in_place, "add_") else "+"
    how = f"y {sign} r" if operands[0] is norm else f"r {sign} y"
    fits = len(operands) == 2 and isinstance(residual, fx.Node) and not add.kwargs and norm.next is add
    fits = fits and (add.target is not in_place or add.args[0] == "iadd")
    if how == "r += y" and fits:  # what else shares the memory of r would miss the sum
        fits = blocks.is_open_norm(_module(residual)) and _only_user(residual) is add
    return (residual, how) if fits else (None, None)


def _module(node: fx.Node) -> Any:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if node.op == "call_module" and owner else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: fx.Node | None) -> str | None:
    """The kernels' name of the activation that a node is: a module, a function or a method, in place or not."""
    if node is None or node.op == "call_module":
        return blocks.activation_name(_module(node)) if node else None
    spelled = str(getattr(node.target, "__name__", node.target))
    name = spelled.removesuffix("_")
    known = node.op == "call_method" or any(getattr(owner, spelled, None) is node.target for owner in (F, torch))
    if name not in FUSED_ACTIVATIONS or not known:
        return None
    slope = ACTIVATIONS[name].slope
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", slope)
    return name if slope is None or given == slope else None


def _describe(node: fx.Node) -> str:
    if node.op == "call_module":
        return blocks.describe(_module(node), str(node.target))
    name = inplace_methods[str(node.args[0])].format("y", "x") if node.target is in_place else node.name
    return f"what follows is {'the end of the model' if node.op == 'output' else name}"
