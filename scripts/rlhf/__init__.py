"""RLHF in three stages: supervised fine-tuning, a reward model, PPO.

This file imports nothing, so that importing the wings without torch (config, store) stays fast.
"""
