"""Any `timm` model with ``features_only`` as a detectron2 backbone.

Shape legend: N images, Hi x Wi the spatial size of stage i, Ci its channels.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn


class WeightsUnusable(ValueError):
    """Pretrained weights are missing or are not those of the architecture."""

    exit_code = 2


class TimmBackbone(Backbone):
    """A timm feature extractor whose outputs are named after detectron2's ResNet stages.

    Stage ``res2`` has stride 4, ``res3`` 8, ``res4`` 16 and ``res5`` 32, so the model goes wherever a ResNet goes, an
    ``FPN`` included.

    Args:
        name: timm model name, e.g. ``"mobilenetv2_100"``.
        out_features: the stages to return.
        weights: ``None`` for random weights, ``"timm"`` for timm's own pretrained ones, ``"package:file"`` for a state
            dict inside an installed package, otherwise the path of a state dict.
        freeze_norm: keep every BatchNorm at its loaded statistics and affine parameters, as detectron2's ``FrozenBN``
            does; small batches cannot estimate better ones.

    Raises:
        WeightsUnusable: the weights are not there or do not fit the model.
        ValueError: the model lacks a stage.
    """

    def __init__(
        self,
        *,
        name: str,
        out_features: tuple[str, ...] = ("res3", "res4", "res5"),
        weights: str | None = None,
        freeze_norm: bool = False,
    ) -> None:
        super().__init__()
        self.body = timm.create_model(name, pretrained=weights == "timm", features_only=True)
        self._freeze_norm = freeze_norm
        stages = {f"res{stride.bit_length() - 1}": i for i, stride in enumerate(self.body.feature_info.reduction())}
        missing = [feature for feature in out_features if feature not in stages]
        if missing:
            raise ValueError(f"timm model {name!r} has no stage {', '.join(missing)}; it has {', '.join(stages)}")
        self._stage_indices = {feature: stages[feature] for feature in out_features}
        self._out_features = list(out_features)
        info = self.body.feature_info
        self._out_feature_channels = {f: info.channels()[i] for f, i in self._stage_indices.items()}
        self._out_feature_strides = {f: info.reduction()[i] for f, i in self._stage_indices.items()}
        if weights not in (None, "timm"):
            load_weights(self.body, weights_path(weights))
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
        maps = self.body(images)
        return {feature: maps[i] for feature, i in self._stage_indices.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f: ShapeSpec(channels=self._out_feature_channels[f], stride=self._out_feature_strides[f])
            for f in self._out_features
        }


def weights_path(weights: str) -> Path:
    """The file that ``weights`` names: ``"package:relative/file"`` inside an installed package, or a path."""
    package, separator, relative = weights.partition(":")
    if not separator:
        return Path(weights)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsUnusable(f"weights {weights!r}: the package {package!r} is not installed")
    return Path(spec.submodule_search_locations[0]) / relative


def load_weights(body: nn.Module, path: Path) -> None:
    """Load a classifier's state dict into a feature extractor.

    Names are tried first. Ports of one architecture differ in names but not in the order of their layers, so otherwise
    tensors are taken in order, shape by shape; what comes after the last stage (the classifier) is left out.
    """
    if not path.is_file():
        raise WeightsUnusable(f"pretrained weights not found: {path}; check `weights` of the recipe's backbone")
    source = torch.load(path, map_location="cpu", weights_only=True)
    target = body.state_dict()
    if all(key in source for key in target):
        body.load_state_dict({key: source[key] for key in target})
        return
    renamed = dict(zip(target, source.values(), strict=False))
    wrong = [key for key, value in target.items() if key not in renamed or renamed[key].shape != value.shape]
    if wrong:
        found = tuple(renamed[wrong[0]].shape) if wrong[0] in renamed else "nothing"
        raise WeightsUnusable(
            f"{path}: the weights do not fit the model: {wrong[0]} is {tuple(target[wrong[0]].shape)} in the model and "
            f"{found} in the file ({len(wrong)} of {len(target)} tensors differ); use the weights of this architecture"
        )
    body.load_state_dict(renamed)
