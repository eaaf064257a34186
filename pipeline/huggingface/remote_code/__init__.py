"""Code that is copied into exported folders for transformers (trust_remote_code); nothing imports it here."""
