"""What codes are like: figures, agreement with vectors and behaviour, the biggest branches."""
