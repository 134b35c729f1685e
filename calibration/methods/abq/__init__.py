"""ABQ-LLM (arXiv 2408.08554): any weight bits with any activation bits, by transforms and clips
learned block by block.
"""
