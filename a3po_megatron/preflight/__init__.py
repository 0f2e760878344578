"""What a run needs before it begins: from facts and plans alone, no torch."""
