"""Merge fine-tuned LLaMA models by pruning and amplifying their delta parameters."""
