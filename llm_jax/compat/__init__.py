"""Other worlds: the models and files of Hugging Face, and the same model in PyTorch."""
