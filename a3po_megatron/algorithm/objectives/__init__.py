"""Objectives, one file each (token_loss.py is the seam)."""
