"""``megatron-opd plan CONFIG --nodes N --gpu h100``: memory, FLOPs, traffic and seconds of a step before the job queues."""
