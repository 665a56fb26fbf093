"""Tasks, answers, and how much of an expert a model keeps."""
