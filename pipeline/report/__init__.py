"""Manifests → ``report.json`` → ``report.md`` and ``report.html``."""

from pipeline.report.build import build_report
from pipeline.report.gallery import GalleryImage
from pipeline.report.render import write_report

__all__ = ["GalleryImage", "build_report", "write_report"]
