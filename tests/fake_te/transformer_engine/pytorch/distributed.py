"""Names that Megatron imports or inherits from."""


class CudaRNGStatesTracker:
    def reset(self) -> None:
        pass


def activation_recompute_forward(*_: object, **__: object) -> None:
    raise NotImplementedError("recomputation under FP8 is not imitated")
