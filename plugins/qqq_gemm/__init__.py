"""QQQGemm: W4A8 with packed 4-bit weights, a scale per channel or per group."""
