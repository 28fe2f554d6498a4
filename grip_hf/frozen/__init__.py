"""The frozen vision-language model, asked: by training for targets and rewards, by evaluation for answers."""
