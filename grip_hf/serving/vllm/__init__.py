"""The vLLM plug-in: pictures cost a server as many tokens as the budget keeps. See `grip_hf/serving/README.md`."""
