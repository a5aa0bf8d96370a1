"""`bncli.fold`: evaluation batch norms folded into the linear or convolution layers before them."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.engine.convert import aligned, blocks, graph
from bncli.engine.models.norms import BatchNorm
from bncli.errors import UsageError
from bncli.kernels import native

NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward)
LAYERS = {nn.Linear: 2} | {  # class -> dimensions of its output
    getattr(nn, f"{kind}{n}d"): n + 2 for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)
}
ADVICE = "fold has to know which layer comes before a batch norm"


@dataclass(frozen=True)
class FoldedNorm:
    """One batch norm of the model: the layer that it was folded into, or why it was left."""

    name: str  # qualified, as in the state_dict
    into: str | None
    reason: str | None


@dataclass(frozen=True)
class Folding:
    """What `fold` did to each batch norm of a model; as text, a table."""

    norms: tuple[FoldedNorm, ...]

    def __str__(self) -> str:
        rows = [(line.name or "(the model)", line.into or "left as it was", line.reason or "") for line in self.norms]
        total = f"{sum(line.into is not None for line in self.norms)} of {len(self.norms)} batch norms folded"
        return "\n".join([total, *aligned([("batch norm", "folded into", "why not"), *rows])])


class Folded(nn.Module):
    """What is left of a batch norm that was folded: activation(input + residual), as `BatchNorm.forward` has it.

    It takes inputs of `dims` dimensions only, (N, C, *S), whose channels are the outputs of the layer before.
    """

    def __init__(self, dims: int, activation: str | None = None) -> None:
        super().__init__()
        self.dims, self.activation = dims, activation

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        if input.dim() != self.dims:
            raise ValueError(
                f"this batch norm was folded for inputs of {self.dims} dimensions and meets {input.dim()}, whose "
                "channels are not the outputs of the layer before; do not fold this model"
            )
        return native.finish(input, residual, activation or self.activation)


class _Tracer(graph.Tracer):
    """A tracer that looks into each nn.Sequential, and takes a norm that was folded for the norm that it was."""

    looks_into = (nn.Identity, nn.Sequential)
    norms = (_BatchNorm, Folded)


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A copy of a model for evaluation, whose batch norms are part of the linear or convolution layers before them.

    With the running statistics, a batch norm is an affine map of each channel (Ioffe & Szegedy 2015, algorithm 2, line
    11), which the layer before can take over (Jacob et al. 2018, arXiv 1712.05877, section 3.2): W' = gamma W /
    sqrt(var + eps) and b' = beta + (b - mean) gamma / sqrt(var + eps), computed in float64 and rounded once.

    torch.fx follows the data of the evaluation forward to find the layer. A norm is folded where its input is the
    output of nn.Linear, nn.Conv1d to 3d or nn.ConvTranspose1d to 3d, nothing else uses that output, and neither the
    norm nor the layer's weight is used a second time. The other norms are left, with the reason in the report. An
    activation or a residual that a norm of bncli takes along stays.

    Args:
        model: Any module that torch.fx can trace in evaluation mode; it is left as it is. It may be converted, or
            compiled: the copy is not.

    Returns:
        The copy in evaluation mode. What was folded stays folded in training mode. Its state_dict has the new weights
        and biases, and no longer those of the folded norms. `bncli_folding` is a `Folding`: the layer that each norm
        was folded into, or why not, which prints as a table.

    Raises:
        UsageError: With the reason, where torch.fx cannot hold the model, or its forward would go another way.
    """
    folded: nn.Module = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()  # without torch.compile's wrapper
    for module in folded.modules():
        module.__class__ = blocks.original_class(module)
    traced = graph.trace(folded, (False,), _Tracer, field="model", advice=ADVICE)
    uses = _Uses(traced)
    names: dict[nn.Module, list[str]] = {}
    for name, module in folded.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    report = []
    for norm, paths in names.items():
        if not isinstance(norm, _BatchNorm):
            continue
        layer, reason = _layer_before(norm, uses)
        report.append(FoldedNorm(paths[0], None if layer is None else names[layer][0], reason))
        if layer is not None:
            _take_over(layer, norm)
            rest = Folded(LAYERS[type(layer)], getattr(norm, "activation", None)).eval()
            for path in paths:
                parent, _, place = path.rpartition(".")
                setattr(folded.get_submodule(parent), place, rest)
    graphs = traced.graph, graph.trace(folded, (False,), _Tracer, field="model", advice=ADVICE).graph
    before, after = ([(node.op, node.target) for node in each.nodes] for each in graphs)
    if before != after:
        what = "the class of a norm, or whether a layer has a bias"
        raise UsageError(f"its forward asks for what fold changes ({what}) and would go another way", field="model")
    folded.__dict__.pop("bncli_conversion", None)
    folded.__dict__["bncli_folding"] = Folding(tuple(report))
    if isinstance(folded, fx.GraphModule):
        folded.meta["_user_preserved_attributes"] = {"bncli_folding": folded.bncli_folding}
    return folded


class _Uses:
    """How often a graph uses each parameter and buffer, by its id, and the input of each batch norm."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced, self.tensors = traced, Counter[int]()
        self.inputs: dict[nn.Module, Any] = {}
        for node in traced.graph.nodes:
            found = self.found(node)
            if isinstance(found, nn.Module):
                self.tensors.update({id(tensor) for tensor in (*found.parameters(), *found.buffers())})
            elif isinstance(found, Tensor):
                self.tensors[id(found)] += 1
            if node.op == "call_module" and isinstance(found, _BatchNorm):
                self.inputs[found] = node.args[0] if node.args else node.kwargs.get("input")
            elif node.target is blocks.run_norm:
                self.inputs[self.found(node.args[0])] = node.args[1]

    def once(self, module: nn.Module) -> bool:
        """Whether the module's tensors are used in one call alone, and so the module."""
        return all(self.tensors[id(tensor)] == 1 for tensor in (*module.parameters(), *module.buffers()))

    def found(self, node: Any) -> Any:
        """The module or tensor of the model that a node calls or reads, or None."""
        if not isinstance(node, fx.Node) or node.op not in ("call_module", "get_attr"):
            return None
        found: Any = self.traced
        for name in str(node.target).split("."):
            found = getattr(found, name)
        return found


def _layer_before(norm: Any, uses: _Uses) -> tuple[Any, str | None]:
    """The layer that a batch norm can be folded into, or why there is none."""
    if not blocks.is_plain(norm) or type(norm).forward not in NORM_FORWARDS:
        return None, f"it has hooks, or a forward of its own ({type(norm).__name__})"
    if norm.running_mean is None or norm.running_var is None:
        return None, "it has no running statistics: in evaluation too it normalizes by the batch"
    if norm not in uses.inputs:
        return None, "the evaluation forward does not call it"
    if not uses.once(norm):
        return None, "it is used more than once"
    node = uses.inputs[norm]
    layer, name = uses.found(node), getattr(node, "target", node)
    if type(layer) not in LAYERS or node.op != "call_module":
        kind = f" ({type(layer).__name__})" if layer is not None else ""
        return None, f"what comes before is {getattr(name, '__name__', name)}{kind}, no linear or convolution layer"
    if not blocks.is_plain(layer):
        return None, f"what comes before is {name}, which has hooks or a forward of its own"
    if not uses.once(layer):
        return None, f"{name}, which comes before, or a weight of it is used more than once"
    if len(node.users) != 1:
        return None, f"the output of {name}, which comes before, is used elsewhere too"
    linear = isinstance(layer, nn.Linear)
    outputs = layer.out_features if linear else layer.out_channels
    if norm.num_features != outputs or (linear and isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)):
        return None, f"its channels are not the outputs of {name}, which comes before"
    return layer, None


def _take_over(layer: Any, norm: Any) -> None:
    """Make a layer's weight and bias those of the layer and the norm after it, in place."""

    def exact(tensor: Tensor | None, default: float) -> Tensor:
        return torch.tensor(default, dtype=torch.float64) if tensor is None else tensor.detach().cpu().double()

    weight = layer.weight
    scale = exact(norm.weight, 1.0) / (exact(norm.running_var, 1.0) + norm.eps).sqrt()  # (C,)
    bias = exact(norm.bias, 0.0) + (exact(layer.bias, 0.0) - exact(norm.running_mean, 0.0)) * scale
    by_output = scale.view(-1, *[1] * (weight.dim() - 1))
    if getattr(layer, "transposed", False):  # (inputs, outputs / groups, *kernel), the groups' inputs after each other
        by_input = scale.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1)
        by_output = by_input.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    for name, value in (("weight", exact(weight, 0.0) * by_output), ("bias", bias)):
        setattr(layer, name, nn.Parameter(value.to(weight), requires_grad=weight.requires_grad))
