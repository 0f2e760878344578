"""Weights on the move: from HF files into shards, from shards into engines, with proof."""
