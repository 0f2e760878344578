"""Formats on disk, and folders that are whole or not there at all."""
