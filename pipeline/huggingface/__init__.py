"""The way in and out of Hugging Face: folders with config.json, safetensors and a tokenizer."""
