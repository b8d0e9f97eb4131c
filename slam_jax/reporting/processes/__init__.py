"""What each encoder process is worth to a trained model."""
