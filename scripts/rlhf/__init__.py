"""RLHF in three steps: supervised fine-tuning, a reward model, PPO.

Import modules from here (`from rlhf import ppo_math`); this file imports nothing, so that the
Snakefile's half (config, store, plan, batch) never pays for torch.
"""
