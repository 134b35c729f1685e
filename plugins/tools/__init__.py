"""Building and inspecting the libraries: compilers, toolkits, machine code."""
