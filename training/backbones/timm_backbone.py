"""Any `timm` model with ``features_only`` as a detectron2 backbone.

Shape legend: N images, Hi x Wi the spatial size of stage i, Ci its channels.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from training.backbones.weight_file import WeightsUnusable, read_weight_file, state_dict_of

# How transformers are told to take images of any size; models that know neither take any size anyway or none.
_ANY_SIZE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
_PROBE_PIXELS = (96, 160)  # a multiple of 32 that no model is built for
logger = logging.getLogger(__name__)


class UnsupportedBackbone(ValueError):
    """There is no such model, or it cannot serve as a detector's backbone as the recipe asks."""

    exit_code = 2


class TimmBackbone(Backbone):
    """A timm feature extractor whose outputs are named after detectron2's ResNet stages.

    Stage ``res2`` has stride 4, ``res3`` 8, ``res4`` 16 and ``res5`` 32, so the model goes wherever a ResNet goes, an
    ``FPN`` included. Where several of the model's maps have one stride, the deepest is the stage.

    Args:
        name: timm model name, e.g. ``"mobilenetv2_100"``.
        out_features: the stages to return.
        weights: ``None`` for random weights, ``"timm"`` for timm's own pretrained ones, ``"package:file"`` for a state
            dict inside an installed package, otherwise the path of a state dict or safetensors file.
        freeze_norm: keep every BatchNorm at its loaded statistics and affine parameters, as detectron2's ``FrozenBN``
            does; small batches cannot estimate better ones.
        img_size: height and width in pixels that the model is built for, where it takes one size only: smaller batches
            are padded to it with zeros, and their maps cut back.
        drop_path_rate: of the model's stochastic depth; 0 leaves the model's own.

    Raises:
        UnsupportedBackbone: unknown name, missing stage, or the model does not take images of any size.
        WeightsUnusable: the weights are not there or do not fit the model.
    """

    def __init__(
        self,
        *,
        name: str,
        out_features: tuple[str, ...] = ("res3", "res4", "res5"),
        weights: str | None = None,
        freeze_norm: bool = False,
        img_size: tuple[int, int] | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.name = name
        self._freeze_norm = freeze_norm
        self._img_size = None if img_size is None else (int(img_size[0]), int(img_size[1]))
        options: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate > 0 else {}
        self.body = _feature_extractor(name, pretrained=weights == "timm", img_size=self._img_size, options=options)
        self._channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        info = self.body.feature_info
        stages = {f"res{int(math.log2(s))}": i for i, s in enumerate(info.reduction()) if math.log2(s).is_integer()}
        missing = [feature for feature in out_features if feature not in stages]
        if missing:
            raise UnsupportedBackbone(
                f"timm model {name!r} has no stage {', '.join(missing)}; it has {', '.join(stages)} "
                f"(strides {', '.join(map(str, info.reduction()))})"
            )
        self._stage_indices = {feature: stages[feature] for feature in out_features}
        self._out_features = list(out_features)
        self._out_feature_channels = {f: info.channels()[i] for f, i in self._stage_indices.items()}
        self._out_feature_strides = {f: info.reduction()[i] for f, i in self._stage_indices.items()}
        self._check_outputs()
        if weights not in (None, "timm"):
            load_weights(self.body, weights_path(weights), name)
        if freeze_norm:
            for module in self._norms():
                module.requires_grad_(False)

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        if self._freeze_norm:
            for module in self._norms():
                module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) normalised images to ``{stage: (N, Ci, Hi, Wi)}``."""
        size = images.shape[-2:]
        maps = self.body(images if self._img_size is None else self._padded(images))
        found = {feature: maps[i] for feature, i in self._stage_indices.items()}
        if self._channels_last:
            found = {feature: value.permute(0, 3, 1, 2) for feature, value in found.items()}
        if self._img_size is None:
            return found
        return {f: value[..., : self._cells(size[0], f), : self._cells(size[1], f)] for f, value in found.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f: ShapeSpec(channels=self._out_feature_channels[f], stride=self._out_feature_strides[f])
            for f in self._out_features
        }

    def _padded(self, images: Tensor) -> Tensor:
        assert self._img_size is not None
        rows, columns = self._img_size[0] - images.shape[-2], self._img_size[1] - images.shape[-1]
        if rows < 0 or columns < 0:
            raise UnsupportedBackbone(
                f"timm model {self.name!r} is built for images of {self._img_size[0]}x{self._img_size[1]} pixels and "
                f"got a batch of {images.shape[-2]}x{images.shape[-1]}; raise the backbone's img_size, or lower "
                "max_edge_pixels of training and export"
            )
        return F.pad(images, (0, columns, 0, rows))

    def _cells(self, pixels: int, feature: str) -> int:
        return -(-pixels // self._out_feature_strides[feature])

    @torch.no_grad()
    def _check_outputs(self) -> None:
        """Run the model once, so that a model of one size only is refused here and not in the first iteration."""
        height, width = _PROBE_PIXELS if self._img_size is None else self._img_size
        training = self.training
        self.eval()
        try:
            outputs = self(torch.zeros(1, 3, height, width))
        except (AssertionError, RuntimeError) as error:
            raise UnsupportedBackbone(
                f"timm model {self.name!r} does not take images of {height}x{width} pixels "
                f"({' '.join(str(error).split())}); give the backbone img_size=(height, width), multiples of what the "
                "model needs and large enough for max_edge_pixels"
            ) from error
        finally:
            self.train(training)
        expected = {f: (1, s.channels, height // s.stride, width // s.stride) for f, s in self.output_shape().items()}
        found = {feature: tuple(value.shape) for feature, value in outputs.items()}
        if found != expected:
            raise UnsupportedBackbone(f"timm model {self.name!r} gives maps of {found}, expected {expected}")


def weights_path(weights: str) -> Path:
    """The file that ``weights`` names: ``"package:relative/file"`` inside an installed package, or a path."""
    package, separator, relative = weights.partition(":")
    if not separator:
        return Path(weights)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsUnusable(f"weights {weights!r}: the package {package!r} is not installed")
    return Path(spec.submodule_search_locations[0]) / relative


def load_weights(body: nn.Module, path: Path, name: str) -> None:
    """Load a classifier's weights into the feature extractor of timm model ``name``."""
    body.load_state_dict(fitted_weights(body, state_dict_of(read_weight_file(path), path), path, name))


def fitted_weights(body: nn.Module, source: Mapping[str, Tensor], path: Path, name: str) -> dict[str, Tensor]:
    """Every tensor of a feature extractor, taken from a classifier's state dict.

    Names are tried first (timm's feature extractors join the first two parts of some). Then timm's own conversion of
    the papers' releases. Ports of one architecture differ in names but not in the order of their layers, so otherwise
    tensors are taken in order, shape by shape; what comes after the last stage (the classifier) is left out.

    Raises:
        WeightsUnusable: they are of another architecture; ``path`` is for the message.
    """
    target = body.state_dict()
    named = _by_name(target, source) or _by_name(target, _converted_by_timm(name, source))
    found = named or dict(zip(target, source.values(), strict=False))
    wrong = [key for key, value in target.items() if key not in found or found[key].shape != value.shape]
    if wrong:
        shape = tuple(found[wrong[0]].shape) if wrong[0] in found else "nothing"
        raise WeightsUnusable(
            f"{path}: the weights do not fit the model: {wrong[0]} is {tuple(target[wrong[0]].shape)} in the model and "
            f"{shape} in the file ({len(wrong)} of {len(target)} tensors differ); use the weights of this architecture"
        )
    return found


def _by_name(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source's tensors under the target's keys, or nothing when one is missing."""
    joined = {_joined(key): value for key, value in source.items()}
    # A feature extractor that keeps the classifier whole has it under "model".
    prefix = "model." if all(key.startswith("model.") for key in target) else ""
    keys = {key: _joined(key.removeprefix(prefix)) for key in target}
    return {key: joined[name] for key, name in keys.items()} if joined.keys() >= set(keys.values()) else {}


def _joined(key: str) -> str:
    return key.replace(".", "_")


def _converted_by_timm(name: str, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The classifier's state dict after timm's own loading, or nothing when that refuses the tensors."""
    try:
        overlay = {"state_dict": dict(source), "source": "timm"}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    except Exception as error:  # timm's conversions fail in as many ways as there are models
        logger.debug("timm does not convert the weights for %s: %s", name, error)
        return {}


def _feature_extractor(
    name: str, *, pretrained: bool, img_size: tuple[int, int] | None, options: dict[str, Any]
) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them"
        raise UnsupportedBackbone(f"timm has no model {name!r}; {hint}")
    for size_option in ({"img_size": img_size},) if img_size is not None else _ANY_SIZE:
        try:
            return timm.create_model(name, pretrained=pretrained, features_only=True, **options, **size_option)
        except TypeError as error:
            if not any(f"'{key}'" in str(error) for key in size_option):
                raise UnsupportedBackbone(f"timm model {name!r}: {error}") from error
            refused = error
        except Exception as error:
            if not pretrained:
                raise UnsupportedBackbone(
                    f"timm model {name!r} cannot be built as a feature extractor: {' '.join(str(error).split())}"
                ) from error
            raise WeightsUnusable(
                f"timm's pretrained weights of {name!r} could not be loaded: {' '.join(str(error).split())}. "
                "Give the path of a local file as the backbone's weights"
            ) from error
    raise UnsupportedBackbone(f"timm model {name!r} takes no img_size: {refused}; leave it out") from refused
