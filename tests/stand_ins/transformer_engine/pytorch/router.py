"""Names that Megatron imports; its router uses them only when it is told to."""

fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = None
