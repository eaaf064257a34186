"""Import and export Hugging Face folders: config.json, safetensors and a tokenizer."""
