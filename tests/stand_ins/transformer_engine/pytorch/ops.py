"""Names in Megatron's annotations."""


class Sequential: ...


class FusibleOperation: ...
