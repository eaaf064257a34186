"""Code that an exported folder carries for transformers (trust_remote_code); nothing here imports it."""
