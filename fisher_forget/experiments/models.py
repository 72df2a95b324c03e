"""Models by name, small enough to retrain many times; and models of the user's own."""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fisher_forget._util.isolation import seeded_rng
from fisher_forget.errors import ConfigError
from fisher_forget.experiments import import_path


def build_model(
    name: str, input_shape: tuple[int, ...], outputs: int, *, seed: int, **options: object
) -> nn.Module:
    """A new model; its initial weights depend on `seed` only, and the global random state is left
    alone.

    A name with a colon is the import path of a function or class of your own, package.module:name;
    that of a plug-in stands for what it declares (`import_path.GROUPS`). It is called with the
    options alone, the global random states seeded, and returns the model.

    Args:
        name: A key of `MODELS`, the name of a plug-in, or an import path.
        input_shape: Shape of one sample, without the batch dimension: (channels, height, width) for
            images.
        outputs: Number of classes, or of regression targets.
        seed: Of the initial weights.
        **options: Keyword arguments of the builder, such as `width`.

    Raises:
        ConfigError: If the name, an option or the input shape does not fit, or a function of your
            own fails.

    Example:
        >>> import torch
        >>> build_model("cnn", (1, 8, 8), 10, seed=0, width=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if name not in MODELS and import_path.is_own(name, "the model"):
        made = import_path.make(name, "the model", options, seed=seed)
        if not isinstance(made, nn.Module):
            got = f"{type(made).__name__} from {name}"
            raise ConfigError(got, "a torch.nn.Module", "Return the model.")
        return made
    if name not in MODELS:
        names = sorted({*MODELS, *import_path.plugins("the model")})
        near = difflib.get_close_matches(name, names, cutoff=0.4)
        fix = f"Did you mean {' or '.join(map(repr, near))}?" if near else "Correct the name."
        expected = f"one of {names}, or package.module:function"
        raise ConfigError(f"the model {name!r}", expected, fix)
    known = list(inspect.signature(MODELS[name]).parameters)[2:]
    if unknown := sorted(set(options) - set(known)):
        got = f"the options {unknown} for the model {name!r}"
        raise ConfigError(got, f"options among {known}", "Remove them.")
    with seeded_rng(seed):
        return MODELS[name](tuple(input_shape), outputs, **options)


def linear(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Softmax (or linear) regression on the flattened input."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), outputs))


def mlp(
    input_shape: tuple[int, ...], outputs: int, *, hidden: Sequence[int] = (1024, 1024)
) -> nn.Module:
    """Fully connected ReLU layers of the `hidden` sizes."""
    sizes = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def cnn(input_shape: tuple[int, ...], outputs: int, *, width: int = 16) -> nn.Module:
    """Small CNN for digits and MNIST, without dropout and BatchNorm: two convolutions, a third from
    16 pixels on."""
    channels, height, side = _image(input_shape, least=2)
    layers: list[nn.Module] = [*_conv(channels, width), *_conv(width, 2 * width), nn.MaxPool2d(2)]
    height, side = height // 2, side // 2
    if min(input_shape[1:]) >= 16:
        layers += [*_conv(2 * width, 2 * width), nn.MaxPool2d(2)]
        height, side = height // 2, side // 2
    head = [nn.Linear(2 * width * height * side, 64), nn.ReLU(), nn.Linear(64, outputs)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def all_cnn(
    input_shape: tuple[int, ...], outputs: int, *, width: float = 0.5, batch_norm: bool = False
) -> nn.Module:
    """All-CNN-C (Springenberg et al. 2015, arXiv:1412.6806, table 1), `width` times as wide.

    Left out are its dropout and the ReLU on the logits; its seventh convolution is padded, so that
    8 x 8 inputs fit.
    """
    channels, *_ = _image(input_shape, least=2)
    narrow, wide = _scaled(96, width), _scaled(192, width)
    # table 1: two stages that each end with a stride of 2 in place of pooling, then 3 x 3 and 1 x 1
    stages = [(size, 3, stride) for size in (narrow, wide) for stride in (1, 1, 2)]
    layers: list[nn.Module] = []
    for after, kernel, stride in [*stages, (wide, 3, 1), (wide, 1, 1)]:
        layers += _conv(channels, after, kernel, stride, batch_norm=batch_norm)
        channels = after
    head = [nn.Conv2d(wide, outputs, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return _he(nn.Sequential(*layers, *head))


def resnet18(input_shape: tuple[int, ...], outputs: int, *, width: float = 0.5) -> nn.Module:
    """ResNet-18 (He et al. 2016, arXiv:1512.03385) for small images: 3 x 3 stem, no max-pooling,
    `width` times 64."""
    channels, *_ = _image(input_shape, least=1)
    sizes = [_scaled(64 * 2**stage, width) for stage in range(4)]
    layers: list[nn.Module] = _conv(channels, sizes[0], batch_norm=True)
    before = sizes[0]
    for stage, after in enumerate(sizes):
        stride = 1 if stage == 0 else 2
        layers += [ResidualBlock(before, after, stride), ResidualBlock(after, after)]
        before = after
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, outputs)]
    return _he(nn.Sequential(*layers, *head))


class ResidualBlock(nn.Module):
    """relu(BN(conv(relu(BN(conv(x))))) + shortcut(x)); the shortcut is a 1 x 1 convolution where
    the shape changes."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        second = [nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        self.residual = nn.Sequential(*_conv(before, after, 3, stride, batch_norm=True), *second)
        same = before == after and stride == 1
        resized = [nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*resized)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride]."""
        out: Tensor = self.relu(self.residual(x) + self.shortcut(x))
        return out


def _conv(
    before: int, after: int, kernel: int = 3, stride: int = 1, *, batch_norm: bool = False
) -> list[nn.Module]:
    """Convolution and ReLU; BatchNorm between them replaces the bias."""
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=not batch_norm)
    # every ReLU is its own module and not in place: hooks on shared or in-place modules see the
    # wrong values
    return [conv, nn.BatchNorm2d(after), nn.ReLU()] if batch_norm else [conv, nn.ReLU()]


def _he(model: nn.Module) -> nn.Module:
    """He initialisation of the convolutions: with PyTorch's default, deep ReLU nets without
    BatchNorm fade to zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _image(input_shape: tuple[int, ...], *, least: int) -> tuple[int, int, int]:
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        got = f"the input shape {input_shape} for a convolutional model"
        fix = "Use the model 'mlp' or 'linear' for inputs that are not images."
        raise ConfigError(got, f"(channels, height, width) with sides of at least {least}", fix)
    return input_shape[0], input_shape[1], input_shape[2]


BUILDERS: tuple[Callable[..., nn.Module], ...] = (linear, mlp, cnn, all_cnn, resnet18)
MODELS = {builder.__name__: builder for builder in BUILDERS}
