"""Names in the signatures of Megatron's fused layer, which is not built."""


class FusibleOperation:
    pass


class Sequential:
    pass
