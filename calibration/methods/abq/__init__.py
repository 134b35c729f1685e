"""The learnable parts of ABQ-LLM (arXiv 2408.08554): fake quantisation, equivalent transforms, losses, training of one block."""
