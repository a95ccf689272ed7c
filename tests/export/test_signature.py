"""The promise with masks and without, and how the graph's outputs become detections."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from export.signature import DetectorSignature, detections_from_outputs
from tests.serving.pixel_means import make_signature


def test_a_file_written_before_there_were_masks_is_still_read() -> None:
    signature = make_signature()
    old = json.loads(signature.to_json())
    del old["mask_size"]
    assert DetectorSignature.from_json(json.dumps(old)) == signature
    assert signature.output_names == ("num_detections", "boxes", "scores", "labels")


def test_with_masks_the_promise_survives_being_written_and_has_one_more_output() -> None:
    signature = make_signature(mask_size=28)
    assert DetectorSignature.from_json(signature.to_json()) == signature
    assert signature.outputs["masks"] == ("float32", (signature.max_detections, 28, 28))
    assert list(signature.outputs)[-1] == "masks"
    assert dataclasses.replace(signature, mask_size=None).output_names == signature.output_names[:-1]


def test_detections_of_each_image_are_without_the_empty_slots() -> None:
    generator = np.random.default_rng(0)
    outputs = {
        "num_detections": np.array([[2], [0], [3]], np.int32),
        "boxes": generator.random((3, 3, 4), np.float32),
        "scores": generator.random((3, 3), np.float32),
        "labels": generator.integers(0, 5, (3, 3)).astype(np.int32),
        "masks": generator.random((3, 3, 28, 28), np.float32),
    }
    found = detections_from_outputs(outputs)
    assert [len(each) for each in found] == [2, 0, 3]
    assert [each.masks.shape for each in found] == [(2, 28, 28), (0, 28, 28), (3, 28, 28)]
    np.testing.assert_array_equal(found[2].masks, outputs["masks"][2])
    del outputs["masks"]
    assert all(each.masks is None for each in detections_from_outputs(outputs))
