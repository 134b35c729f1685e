"""Float models on disk: sources, Hugging Face folders, GGUF and safetensors files."""
