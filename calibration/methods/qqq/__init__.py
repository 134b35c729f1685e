"""QQQ (arXiv 2406.09904): W4A8 by smoothing or rotation, then GPTQ."""
