"""The algorithm as pure tensor functions: advantage, A3PO's token weights, the clipped objective, the correction."""
