"""What each part of SLAM v3 is worth."""
