"""Export formats, by name: each turns the artifact before it into its own."""

from __future__ import annotations
