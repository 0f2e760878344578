"""A3PO on Megatron-Core and vLLM: exact reinforcement learning from verifiable rewards."""

__version__ = "0.1.0"
