"""Offline conversion: HF folder ↔ Megatron checkpoint, and the proof that a layout loses nothing. No ranks."""
