"""Learn which visual tokens to keep: warm-up, GRPO on TRL's trainer, and the relaxation it is compared with."""
