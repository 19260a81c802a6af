"""The models and files of Hugging Face, in and out; the same model in PyTorch."""
