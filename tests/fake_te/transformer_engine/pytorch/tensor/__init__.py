"""Quantised tensors: parameters stay in bf16, so that there are none."""


class QuantizedTensor:
    pass
