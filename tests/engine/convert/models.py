"""Models of torchvision's families written by hand, narrow but with all their layers, and others as people write them.

The forwards of BasicBlock, Bottleneck, InvertedResidual and MBConv are torchvision's, word for word.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli.engine.models import Residual


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES = numbers(4, 3, 8, 8)


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


# --- ResNet (He et al. 2015) ------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out  # noqa: RET504


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)

        out = self.conv3(out)
        out = self.bn3(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out  # noqa: RET504


def block(kind: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, stride: int = 1) -> nn.Module:
    outputs = width * kind.expansion
    if stride == 1 and inputs == outputs:
        return kind(inputs, width)
    return kind(inputs, width, stride, nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)))


class ResNet(nn.Module):
    """ResNet-18 by default: (N, 3, H, W) -> (N, 5)."""

    def __init__(
        self,
        kind: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        width: int = 4,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            parts = []
            for place in range(count):
                parts.append(block(kind, inputs, width * 2**stage, 2 if stage and not place else 1))
                inputs = width * 2**stage * kind.expansion
            stages.append(nn.Sequential(*parts))
        self.layer1, self.layer2, self.layer3, self.layer4 = (*stages, *[nn.Identity()] * 4)[:4]
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(inputs, 5)

    def features(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.layer4(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        return self.fc(x)


def small_resnet(kind: type[BasicBlock] | type[Bottleneck] = BasicBlock) -> ResNet:
    """Three blocks, one of them with a projection."""
    return ResNet(kind, (2, 1))


def residual(inner: nn.Module | None = None) -> Residual:
    """A block of bncli's own models, of 3 channels."""
    body = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), inner or nn.ReLU(), nn.BatchNorm2d(3))
    return Residual(body, nn.Sequential(), nn.SiLU())


# --- MobileNetV2 (arXiv 1801.04381) -----------------------------------------------------------------------------------


class ConvNormActivation(nn.Sequential):
    def __init__(
        self, inputs: int, outputs: int, activation: Callable[[], nn.Module] | None, size: int = 3, stride: int = 1,
        groups: int = 1,
    ) -> None:  # fmt: skip
        norm = nn.BatchNorm2d(outputs)
        super().__init__(conv(inputs, outputs, size, stride, groups), norm, *([activation()] if activation else []))


class InvertedResidual(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, stride: int, expansion: int, activation: Callable[[], nn.Module] = nn.ReLU6
    ) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        hidden, layers = inputs * expansion, []
        if expansion != 1:
            layers.append(ConvNormActivation(inputs, hidden, activation, 1))
        layers.append(ConvNormActivation(hidden, hidden, activation, stride=stride, groups=hidden))
        self.conv = nn.Sequential(*layers, conv(hidden, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        else:  # noqa: RET505, as torchvision writes it
            return self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers, inputs = [ConvNormActivation(3, 4, nn.ReLU6, stride=2)], 4
        for expansion, outputs, count, stride in [(1, 2, 1, 1), (6, 3, 2, 2), (6, 4, 3, 2), (6, 8, 4, 2), (6, 12, 3, 1),
                                                  (6, 20, 3, 2), (6, 40, 1, 1)]:  # fmt: skip
            for place in range(count):
                layers.append(InvertedResidual(inputs, outputs, 1 if place else stride, expansion))  # type: ignore[arg-type]
                inputs = outputs
        self.features = nn.Sequential(*layers, ConvNormActivation(inputs, 16, nn.ReLU6, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


# --- EfficientNet (arXiv 1905.11946) ----------------------------------------------------------------------------------


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool, self.activation, self.scale_activation = nn.AdaptiveAvgPool2d(1), nn.SiLU(True), nn.Sigmoid()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class StochasticDepth(nn.Module):
    """Leaves out whole examples (arXiv 1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        return x * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.p).div_(1 - self.p)


class MBConv(nn.Module):
    def __init__(self, expansion: int, size: int, stride: int, inputs: int, outputs: int, p: float) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        hidden, layers = inputs * expansion, []
        if expansion != 1:
            layers.append(ConvNormActivation(inputs, hidden, nn.SiLU, 1))
        layers.append(ConvNormActivation(hidden, hidden, nn.SiLU, size, stride, hidden))
        squeeze, project = SqueezeExcitation(hidden, max(1, inputs // 4)), ConvNormActivation(hidden, outputs, None, 1)
        self.block = nn.Sequential(*layers, squeeze, project)
        self.stochastic_depth = StochasticDepth(p)

    def forward(self, input: Tensor) -> Tensor:
        result = self.block(input)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += input
        return result


class EfficientNet(nn.Module):
    """EfficientNet-B0."""

    def __init__(self) -> None:
        super().__init__()
        stages = []
        for expansion, size, stride, inputs, outputs, count in [
            (1, 3, 1, 4, 2, 1), (6, 3, 2, 2, 3, 2), (6, 5, 2, 3, 5, 2), (6, 3, 2, 5, 10, 3), (6, 5, 1, 10, 14, 3),
            (6, 5, 2, 14, 24, 4), (6, 3, 1, 24, 40, 1),
        ]:  # fmt: skip
            rest = [MBConv(expansion, size, 1, outputs, outputs, 0.1) for _ in range(count - 1)]
            stages.append(nn.Sequential(MBConv(expansion, size, stride, inputs, outputs, 0.0), *rest))
        stem, last = ConvNormActivation(3, 4, nn.SiLU, stride=2), ConvNormActivation(40, 16, nn.SiLU, 1)
        self.features = nn.Sequential(stem, *stages, last)
        self.avgpool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Dropout(0.2, True), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


# --- other ways of writing --------------------------------------------------------------------------------------------


class FunctionalBottleneck(Bottleneck):
    """Functional activations, in place and not, and the shortcut taken first."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)).relu_()
        out = torch.add(identity, self.bn3(self.conv3(out)))
        return torch.relu(out)


class DenseLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv(inputs, 8, 1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 4)

    def forward(self, *features: Tensor) -> Tensor:
        out = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(out)))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(3 + 4 * place) for place in range(3))
        self.norm = nn.BatchNorm2d(15)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(*features))
        return self.norm(torch.cat(features, 1))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8, bias=False),
                         nn.BatchNorm1d(8), nn.SiLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 2))  # fmt: skip


# Name -> the model and an input.
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "basic blocks": (small_resnet, IMAGES),
    "bottlenecks": (lambda: small_resnet(Bottleneck), IMAGES),
    "functional bottlenecks": (lambda: small_resnet(FunctionalBottleneck), IMAGES),
    "own residuals": (lambda: nn.Sequential(residual(), residual()), IMAGES),
    "inverted residuals": (lambda: nn.Sequential(*(InvertedResidual(3, 3, 1, 4, nn.SiLU) for _ in range(2))), IMAGES),
    "mb convolutions": (lambda: nn.Sequential(*(MBConv(4, 3, 1, 3, 3, 0.3) for _ in range(2))), IMAGES),
    "dense net": (DenseBlock, IMAGES),
    "mlp": (mlp, numbers(10, 6)),
}
