"""What the scripts share; no script itself."""
