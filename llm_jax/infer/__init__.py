"""From a trained model to text, or to a class."""
