"""Runs on the Hugging Face hub: what is pushed of them, the card that stands over them, and bringing them back."""
