"""How much work space the output layer takes: what memory planning counts, too. Imports no torch."""

# Of float32 work space for one chunk's logits, when the caller does not say; on a CPU twice with entropy.
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}
