"""``megatron-opd check CONFIG --gpus N``: what each rank's memory holds, whether it fits, and what to change."""
