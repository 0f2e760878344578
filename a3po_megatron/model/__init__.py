"""The model: facts from an HF config, the map between HF tensors and shards, the Megatron modules."""
