"""The command line: app.py, and one file a command, which parses, calls and prints."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
