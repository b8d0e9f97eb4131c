"""What weights of fewer bits change."""
