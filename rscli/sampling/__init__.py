"""Noisy predictions, counted: the sampler, its noise, its threads, and how fast it may go."""
