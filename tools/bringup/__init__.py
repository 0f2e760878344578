"""The experiments of tools/gpu_bringup.py, and what runs them. tests/gpu asserts on the same functions."""
