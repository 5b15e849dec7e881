class DelayedScaling:
    """A base class of Megatron's; FP8 is never on here."""
