"""Formats on disk that more than one room reads or writes."""
