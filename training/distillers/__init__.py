"""The ways to train a student, by the name that ``distiller=`` takes."""

from __future__ import annotations

from training.distillers.lgd.distiller import LgdConfig
from training.distillers.none import NoDistillerConfig

DISTILLERS = {"lgd": LgdConfig, "none": NoDistillerConfig}
