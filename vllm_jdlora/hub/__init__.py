"""Collections on a Hugging Face hub: the model card, what is uploaded, and what is taken from a repository."""
