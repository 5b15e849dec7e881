class QuantizedTensor:
    """No tensor is one."""
