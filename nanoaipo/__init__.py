"""What the scripts share: a file per concern, and nothing in it imports its own user."""
