"""ABQGemm: any-bit weights as bit planes, activations of 2 to 8 bits or 16."""
