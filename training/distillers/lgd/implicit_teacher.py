"""The implicit teacher of LGD: labels and the student's own features -> instructive features of the same shapes.

Shapes: N images, C channels, L levels of (Hl, Wl) cells. No level has parameters of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.distillers.lgd.appearance_encoder import AppearanceEncoder
from training.distillers.lgd.knowledge_mapper import KnowledgeMapper
from training.distillers.lgd.label_encoder import LabelEncoder
from training.distillers.lgd.objects import ObjectBatch
from training.distillers.lgd.relation_adapter import Query, RelationAdapter


class ImplicitTeacher(nn.Module):
    """Label and appearance encoding, relation adaptation, knowledge mapping (Zhang et al., AAAI 2022, section 3).

    Args:
        channels: C of the student's pyramid.
        num_classes: K.
        context_object: The batches carry a context object in each image's last slot.
        use_masks: The batches carry crops of the objects' masks.
        detach_appearance: The teacher's loss does not reach the student's features.
        query: See `RelationAdapter`.
        num_heads: See `RelationAdapter`.
        residual: Residual connections around the label encoder, the attention and the mapper's refinements.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        context_object: bool,
        use_masks: bool,
        detach_appearance: bool,
        query: Query,
        num_heads: int,
        residual: bool,
    ) -> None:
        super().__init__()
        self.detach_appearance = detach_appearance
        self.label_encoder = LabelEncoder(
            channels=channels, num_classes=num_classes, use_masks=use_masks, residual=residual
        )
        self.appearance_encoder = AppearanceEncoder(channels=channels)
        self.relation_adapter = RelationAdapter(channels=channels, num_heads=num_heads, query=query, residual=residual)
        self.knowledge_mapper = KnowledgeMapper(channels=channels, context_object=context_object, residual=residual)

    def forward(self, features: dict[str, Tensor], objects: ObjectBatch, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """{level: (N, C, Hl, Wl)} of the student -> the same of the teacher, in float32 at least.

        Args:
            masks: {level: (N, M, Hl * Wl)}, where each object's appearance is read and its knowledge painted.
        """
        appearance = torch.stack(
            [
                self.appearance_encoder(feature.detach() if self.detach_appearance else feature, masks[level])
                for level, feature in features.items()
            ]
        )
        interacted = self.relation_adapter(appearance, self.label_encoder(objects), objects.is_object)
        return {
            level: self.knowledge_mapper(embedding, masks[level], features[level].shape[-2:])
            for level, embedding in zip(features, interacted, strict=True)
        }
