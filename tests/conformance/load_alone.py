"""A process of its own that loads students as somebody without this project's distillers would.

Reads folders from standard input, one a line, each with ``model.yaml`` (detectron2's lazy tree), ``student.pth`` and
``probe.pt`` (a list of detectron2 inputs). Builds the model, loads the checkpoint strictly, and answers with a line of
JSON: this project's modules that are loaded by then. The model's detections lie in ``detections.pt``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate

PACKAGES = ("pipeline", "training", "export", "serving")


def main() -> None:
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        model = instantiate(LazyConfig.load(str(folder / "model.yaml"))).eval()
        checkpoint = torch.load(folder / "student.pth", weights_only=True)
        model.load_state_dict(checkpoint["model"], strict=True)
        with torch.inference_mode():
            detections = [output["instances"].get_fields() for output in model(torch.load(folder / "probe.pt"))]
        plain = [{name: getattr(value, "tensor", value) for name, value in fields.items()} for fields in detections]
        torch.save(plain, folder / "detections.pt")
        modules = sorted(name for name in sys.modules if name.split(".")[0] in PACKAGES)
        sys.stdout.write(json.dumps(modules) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
