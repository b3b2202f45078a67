"""Sampling: the engine interface, the Megatron engine, interleaved RA3 rollouts."""
