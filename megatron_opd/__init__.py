"""On-policy distillation on Megatron-Core and SGLang."""
