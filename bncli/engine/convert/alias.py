"""Which nodes of a graph may write into the memory of a tensor: more than do, never fewer."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from bncli.engine.convert.tracing import in_place
from bncli.engine.models.norms import BatchNorm

# Modules whose output is a tensor of its own, which no write into their input changes.
FRESH = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div}


def may_write(nodes: Sequence[fx.Node], value: Any, root: nn.Module) -> bool:
    """Whether one of the nodes, in a graph of `root`, may write into the memory of `value`."""
    memory = set(_aliases(value, root))
    written = (source for node in nodes if _writes(node, root) for source in node.all_input_nodes)
    return any(memory & set(_aliases(source, root)) for source in written)


def is_own(value: Any, root: nn.Module) -> bool:
    """Whether a tensor shares its memory with no other and is used once: a write into it is seen by its user alone."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return False
    if value.op == "call_module":
        module = root.get_submodule(str(value.target))
        return isinstance(module, FRESH) or (type(module) is nn.Identity and is_own(value.args[0], root))
    return value.op == "call_function" and value.target in ARITHMETIC


def _aliases(value: Any, root: nn.Module) -> Iterator[fx.Node]:
    """The nodes whose memory a value may share: itself and what it may be a view of."""
    if isinstance(value, fx.Node):
        yield value
        fresh = value.op == "call_module" and isinstance(root.get_submodule(str(value.target)), FRESH)
        for source in () if fresh else value.all_input_nodes:
            yield from _aliases(source, root)


def _writes(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        known = type(module).__module__.startswith("torch.nn.modules") and not list(module.children())
        return not isinstance(module, BatchNorm) and (not known or bool(getattr(module, "inplace", False)))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = node.target is in_place or name == "setitem" or name.endswith("_")
    return named or "out" in node.kwargs or any(value is True for value in (*node.args, *node.kwargs.values()))
