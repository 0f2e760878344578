"""A run on disk: its checkpoints, its journal, and what stops it. It knows who trains only as state to keep."""
